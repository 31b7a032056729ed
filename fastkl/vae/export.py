"""Encoder and decoder as programs of torch.export or ONNX, which run where fastkl is not installed."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.vae import checkpoint
from fastkl.vae.data.arrays import first_line
from fastkl.vae.data.scaling import Scaling
from fastkl.vae.errors import UserError, check_installed
from fastkl.vae.likelihood import DISCRETE, PIXELS
from fastkl.vae.model import VAE
from fastkl.vae.settings import Settings

FORMATS = ("pt2", "onnx")


class Scaled(nn.Module):
    """The networks and the scaling of the data, which becomes a part of the program."""

    shift: Tensor
    scale: Tensor

    def __init__(self, vae: VAE, scaling: Scaling):
        super().__init__()
        self.vae, self.likelihood, self.levels = vae, scaling.likelihood, scaling.levels
        # In float64, as in scaling.py: large numbers keep their last digits.
        self.register_buffer("shift", torch.tensor(scaling.mean, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(scaling.deviation, dtype=torch.float64))


class Encoder(Scaled):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = ((x.double() - self.shift) / self.scale).float()
        if self.likelihood in PIXELS:
            x = x.clamp(0, 1)
        if self.likelihood in DISCRETE:
            x = (x * (self.levels - 1)).round() / (self.levels - 1)
        q = self.vae.posterior(x)
        return q.mean, q.logvar


class Decoder(Scaled):
    def forward(self, z: Tensor) -> Tensor:
        return self.vae.pictured(z) * self.scale.float() + self.shift.float()


def export(whole: VAE, scaling: Scaling, settings: Settings, learned: bool, folder: Path, kind: str) -> list[str]:
    """Write the programs and their description, export.json, and return notes on omitted parts. `learned`: latents come
    from a learned prior."""
    if kind not in FORMATS:
        raise UserError(f"format must be {' or '.join(FORMATS)}, got {kind!r}")
    if kind == "onnx":
        for package in ("onnx", "onnxscript"):
            check_installed(package, "--format onnx")
    checkpoint.prepare(folder)
    vae = copy.deepcopy(whole).cpu().eval()
    vae.prior, vae.activation_checkpointing = None, False
    x, z = ["N", *vae.shape], ["N", *vae.latent_shape]
    about: dict[str, Any] = {"encoder": {"x": x, "mean": z, "logvar": z}, "decoder": {"z": z, "x": x}}
    decoder, vae.decoder = vae.decoder, nn.Identity()  # a program holds no weights but its own
    content = program("encoder", Encoder(vae, scaling), about["encoder"], kind)
    checkpoint.write(folder / f"encoder.{kind}", content)
    if whole.autoregressive:
        del about["decoder"]
    else:
        vae.encoder, vae.decoder = nn.Identity(), decoder
        content = program("decoder", Decoder(vae, scaling), about["decoder"], kind)
        checkpoint.write(folder / f"decoder.{kind}", content)
    about |= {"dtype": "float32", "units": "those of the training file", "notes": notes(whole, settings, learned)}
    checkpoint.write(folder / "export.json", (json.dumps(about, indent=2) + "\n").encode())
    return about["notes"]


def program(name: str, module: nn.Module, sizes: dict[str, list[Any]], kind: str) -> bytes:
    """The module as a program with any batch size. `sizes`: the sizes of the input, then those of the outputs."""
    (argument, (_, *shape)), *outputs = sizes.items()
    example = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
    batch: Any = {0: torch.export.Dim("batch", min=1)}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # mutes its list of missing optional libraries
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if kind == "pt2":
                buffer = io.BytesIO()
                torch.export.save(torch.export.export(module, (example,), dynamic_shapes=(batch,)), buffer)
                return buffer.getvalue()
            found = torch.onnx.export(
                module, (example,), dynamo=True, dynamic_shapes=(batch,), input_names=[argument],
                output_names=[label for label, _ in outputs], verbose=False,
            )  # fmt: skip
            assert found is not None
            return found.model_proto.SerializeToString()
    except Exception as error:  # a model of one's own may fail in any way
        raise UserError(f"the {name} cannot be exported as {kind}: {first_line(error)}") from error
    finally:
        log.setLevel(level)


def notes(vae: VAE, settings: Settings, learned: bool) -> list[str]:
    """Notes on the parts of the run that its programs lack."""
    lines = []
    if vae.autoregressive:
        lines.append("the decoder is left out: an autoregressive one draws its values in a loop; use `fastkl decode`")
    if learned:
        lines.append(f"the {settings.prior} prior is left out: draws of it are `Trained.latents`")
    if side := settings.image_size:
        lines.append(f"the encoder does not resize: give it images of {side} x {side} pixels")
    return lines
