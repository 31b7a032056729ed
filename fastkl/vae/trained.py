"""The model of a finished or interrupted run, in the units of its data: `fastkl.vae.load("runs/digits")`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import fastkl
from fastkl.priors import Prior
from fastkl.vae import checkpoint, export, prior, rules, streams
from fastkl.vae.data import Data
from fastkl.vae.data.arrays import Part, first_line
from fastkl.vae.data.files import as_array
from fastkl.vae.data.image_sets import Crops
from fastkl.vae.data.scaling import Scaling, arrange
from fastkl.vae.errors import UserError
from fastkl.vae.evaluate import importance_weighted
from fastkl.vae.model import DECODED, ENCODED, VAE, build
from fastkl.vae.settings import Settings


class Trained:
    """A trained model. Data are arrays or tensors in the numbers and the layout of the training file; results are
    float32 tensors on the CPU.

    Attributes:
        vae: the networks, in float32, on `device`, without gradients.
        prior: the learned prior, or None for N(0, I).
        settings, step: the settings of the run, and its number of steps.
        shape, latent_shape: the shape of one datum in the model (images are [C, H, W], videos [C, T, H, W]), and that
            of its latent.
    """

    def __init__(self, vae: VAE, prior: Prior | None, scaling: Scaling, settings: Settings, step: int):
        self.vae, self.prior, self.scaling, self.settings, self.step = vae, prior, scaling, settings, step
        self.shape, self.latent_shape = vae.shape, vae.latent_shape
        self.device = next(vae.parameters()).device

    def __repr__(self) -> str:
        sizes = f"{'x'.join(map(str, self.shape))} to a latent of {'x'.join(map(str, self.latent_shape))}"
        return f"<{self.settings.description} after {self.step:,} steps, {sizes}>"

    def scaled(self, x: Any, name: str = "x") -> Tensor:
        """Data [N, ...] in the numbers of the model, [N, *shape] on the CPU. In a run with --crop, images of another
        size are resized as in training, and their centre is taken.

        Raises:
            UserError: x has another shape than the training data, is not numeric, or is not finite.
        """
        part, _ = arrange(Part(np.asarray(as_array(x))), name)
        rows, size, crop = part.values, self.settings.image_size, self.settings.crop
        if crop and rows.ndim == 4 and rows.shape[2:] != (crop, crop):
            rows = Crops(rows, crop, size, name)[:]
        values = self.scaling.resize(self.scaling.apply(rows), 0 if crop else size)
        if values.shape[1:] != self.shape:
            raise UserError(f"{name} must be data of shape {list(self.shape)}, got {list(part.values.shape[1:])}")
        return values

    def _batches(self, x: Any) -> Iterator[Tensor]:
        for part in self.scaled(x).split(max(1, ENCODED // math.prod(self.shape))):
            yield part.to(self.device)

    @torch.no_grad()
    def posterior(self, x: Any) -> fastkl.DiagonalNormal:
        """q(z | x) for data [N, ...], computed in batches: mean and log-variance [N, *latent_shape]."""
        found = [self.vae.posterior(part) for part in self._batches(x)]
        means, logvars = (torch.cat([getattr(q, name) for q in found]).cpu() for name in ("mean", "logvar"))
        return fastkl.DiagonalNormal(means, logvars)

    def encode(self, x: Any) -> Tensor:
        """Posterior means [N, *latent_shape] of data [N, ...]."""
        return self.posterior(x).mean

    @torch.no_grad()
    def decode(self, z: Any) -> Tensor:
        """Means of the data [N, *shape] for latents [N, *latent_shape], in the units of the training file. An
        autoregressive decoder gives the mean of each value given draws of the earlier ones.

        Raises:
            UserError: z has another shape, or values that are not finite.
        """
        z = torch.as_tensor(z, dtype=torch.float32)
        if z.dim() == 0 or z.shape[1:] != self.latent_shape:
            raise UserError(f"z must be latents [N, {', '.join(map(str, self.latent_shape))}], got {list(z.shape)}")
        if not z.isfinite().all():
            raise UserError("z must be finite, but holds NaN or infinite values")
        parts = z.split(self.decoded_at_once)
        return torch.cat([self.scaling.undo(self.vae.pictured(part.to(self.device)).cpu()) for part in parts])

    @property
    def decoded_at_once(self) -> int:
        """The number of latents in a batch of the decoder."""
        return max(1, DECODED // math.prod(self.shape))

    def seed_decoder(self, seed: int) -> None:
        """Seed the values that an autoregressive decoder draws, as `sample` does."""
        torch.manual_seed(streams.seed_for(seed, "decoder"))

    def reconstruct(self, x: Any) -> Tensor:
        """decode(encode(x)): [N, *shape], in the units of the training file."""
        return self.decode(self.encode(x))

    def latents(self, count: int, *, seed: int = 0) -> Tensor:
        """Draws [count, *latent_shape] from the prior."""
        return prior.draw(self.prior, self.vae, count, seed, "samples")

    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Means of the data [count, *shape] for latents drawn from the prior: the same for the same seed, on every
        process."""
        self.seed_decoder(seed)
        return self.decode(self.latents(count, seed=seed))

    @torch.no_grad()
    def log_prob(self, x: Any, *, num_samples: int = 100, seed: int = 0) -> Tensor:
        """The importance-weighted bound on log p(x) in nats [N], in the model's numbers, with `num_samples` draws.

        Source: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders", arXiv:1509.00519.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        torch.manual_seed(streams.seed_for(seed, "evaluation"))
        found = []
        for part in self._batches(x):
            observed = self.vae.observed(part)
            weighted = importance_weighted(self.vae, observed, self.vae.posterior(part), num_samples, self.prior)
            found.append(weighted[1].cpu())
        return torch.cat(found)

    def export(self, folder: str | PathLike, *, format: str = "pt2") -> list[str]:
        """Write encoder.pt2 and decoder.pt2 for `torch.export.load`, or encoder.onnx and decoder.onnx.

        The programs run without fastkl, on float32 tensors in the units of the training file with any number of data:
        the encoder maps x [N, *shape] to (mean, logvar), the decoder maps z [N, *latent_shape] to the mean of x.
        export.json describes them.

        Args:
            folder: the folder, made if it does not exist.
            format: "pt2", or "onnx" with the packages onnx and onnxscript.

        Returns:
            Notes on omitted parts, such as an autoregressive decoder.

        Raises:
            UserError: a package is missing, the folder is not writable, or a network cannot be exported.
        """
        return export.export(self.vae, self.scaling, self.settings, self.prior is not None, Path(folder), format)


def load(
    run: str | PathLike, *, device: str | torch.device = "cpu", weights: str = "", model: VAE | None = None
) -> Trained:
    """The model in a run's folder.

    Args:
        run: the folder, such as "runs/digits".
        device: the device of the networks.
        weights: "best" (with --patience), "average" (with --ema) or "last". The default is the first that the run has.
        model: the networks, if the run trained a model of your own. Their weights are read from the run.

    Raises:
        UserError: the folder holds no checkpoint, a damaged one, or one without these weights.

    >>> from fastkl import vae
    >>> vae.load("nothing")
    Traceback (most recent call last):
    fastkl.vae.errors.UserError: nothing/checkpoint.pt cannot be read: No such file or directory
    """
    folder = Path(run)
    state = checkpoint.load(folder)
    settings, shape, scaling = (
        rules.resume(state["settings"], {}), tuple(state["shape"]), Scaling.of_state(state["scaling"])
    )  # fmt: skip
    vae = build(settings, shape, scaling.likelihood, copy.deepcopy(model), scaling)
    # The prior's constructor needs data of the right shape. The checkpoint replaces the values that it takes from them.
    blank = torch.zeros(max(1, settings.components), *shape, dtype=torch.float32, device="cpu")
    vae.prior = prior.build(settings, vae, Data("", "", scaling, blank, blank, None, None, None))
    try:
        kept = {"best": state["best"].get("model"), "average": state["average"], "last": state["model"]}
        weights = weights or next(name for name in kept if kept[name])
        if not kept.get(weights):
            raise UserError(f"weights must be one of {', '.join(name for name in kept if kept[name])}, got {weights!r}")
        if weights == "average":
            mean = AveragedModel(vae)
            mean.load_state_dict(state["average"])
            averaged: Any = mean.module
            vae = averaged
        else:
            vae.load_state_dict(kept[weights])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: the checkpoint does not fit its own settings ({first_line(error)})") from None
    vae = vae.to(device).requires_grad_(False).eval()
    learned = vae.prior if state["step"] >= settings.warm_up else None
    return Trained(vae, learned, scaling, settings, int(state["step"]))
