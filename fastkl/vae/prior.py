"""The prior of a run: its construction, its start after the warm-up, and draws from it. None stands for N(0, I).

During the KL warm-up every run uses N(0, I): a mixture that starts on untrained posteriors leaves most of its
components unused. After the warm-up a mixture is fitted to the posteriors, pseudo-inputs pass through the trained
encoder, and a flow starts near the identity. All of them then train jointly with the rest.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastkl.priors import FlowPrior, GaussianMixture, Prior, StandardNormal, VampPrior
from fastkl.vae import streams
from fastkl.vae.data import Data
from fastkl.vae.errors import UserError, require
from fastkl.vae.likelihood import PIXELS
from fastkl.vae.model import ENCODED, VAE
from fastkl.vae.settings import Settings

# Limits of the draws from the posteriors to which a mixture is fitted: draws, and numbers in all.
DRAWS, NUMBERS = 20_000, 2**25
LARGEST = 1024  # the largest latent for full covariances and flows, whose matrices grow with it


def build(settings: Settings, vae: VAE, data: Data) -> Prior | None:
    """The untrained prior, or None for N(0, I)."""
    dim = math.prod(vae.latent_shape)
    large = "--prior flow" if settings.prior == "flow" else f"--covariance {settings.covariance}"
    if large in ("--prior flow", "--covariance full") and dim > LARGEST:
        raise UserError(f"{large} takes at most {LARGEST} latent dimensions, got {dim}: use --prior gmm")
    if settings.prior == "gmm":
        if settings.components > len(data.train):
            raise UserError(f"--components {settings.components} is more than the {len(data.train)} training data")
        return GaussianMixture(settings.components, dim, settings.covariance)
    if settings.prior == "vamp":
        return VampPrior(pseudo_inputs(settings, data), vae.encoder, transform=into_range(data))
    if settings.prior == "flow":
        zuko = require("zuko", "--prior flow")
        # Splines are flexible within 5 deviations and the identity beyond.
        return FlowPrior(zuko.flows.NSF(dim, transforms=2, hidden_features=(64, 64)))
    return None


def pseudo_inputs(settings: Settings, data: Data) -> Tensor:
    """Training data, all different unless `components` exceeds their number."""
    generator = streams.generator(settings.seed, "pseudo-inputs")
    count = len(data.train)
    order = [
        torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        for _ in range(1 + settings.components // count)
    ]
    return data.train[torch.cat(order)[: settings.components]]


def into_range(data: Data) -> nn.Module | None:
    """The map of pseudo-inputs into the range of the data, [0, 1] for Bernoulli data."""
    # Not Hardtanh as in the paper: at pixels of 0 or 1, the most frequent ones, its gradient vanishes.
    return Clamp() if data.likelihood in PIXELS else None


class Clamp(nn.Module):
    """Values clamped to [0, 1], with a straight-through gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.clamp(0, 1) - x).detach()


@torch.no_grad()
def initialise(prior: nn.Module, vae: VAE, data: Data, settings: Settings, device: torch.device) -> None:
    """Fit a mixture to the posteriors of the training data; other priors start as they were built.

    The first fit is to the posterior means, which show the clusters. The second starts from its centres and is to draws
    from the posteriors, because the best prior is the average posterior, which is wider than the means. (In a collapsed
    dimension the means are near 0 and the posterior variances near 1; a mixture of the means alone is far too narrow.)
    """
    if not isinstance(prior, GaussianMixture):
        return
    seed = streams.seed_for(settings.seed, "fit")
    torch.manual_seed(seed)  # the next training step seeds itself
    wanted = max(settings.components, min(DRAWS, NUMBERS // math.prod(vae.latent_shape)))
    rows = min(wanted, len(data.train))  # a random subset: the split has shuffled the rows
    draws = max(1, wanted // rows)
    size, means, drawn = max(1, ENCODED // math.prod(data.shape)), [], []
    for first in range(0, rows, size):
        posterior = vae.posterior(data.train[first : min(first + size, rows)].to(device))
        means.append(posterior.mean.flatten(1))
        drawn.append(posterior.rsample(num_samples=draws).flatten(2).transpose(0, 1).flatten(0, 1))
    try:
        prior.fit(torch.cat(means), seed=seed, regularisation=1e-4)
        prior.fit(torch.cat(drawn), init=prior.means, regularisation=1e-4)
    except ValueError as error:
        raise UserError(f"--prior gmm cannot be fitted to the posteriors: {error}") from None


def rsample(prior: Prior | None, vae: VAE, count: int, seed: Tensor) -> Tensor:
    """Reparameterised draws [count, latent] from the prior, the same in all processes, on the device of the seed."""
    standard = StandardNormal(math.prod(vae.latent_shape)).to(seed.device)
    return (standard if prior is None else prior).rsample(count, seed=(seed, 0))


def draw(prior: Prior | None, vae: VAE, count: int, seed: int, purpose: str, component: int | None = None) -> Tensor:
    """Latents [count, *latent_shape] from the prior, or from one of its components, the same in all processes, on the
    CPU."""
    if prior is None:
        return torch.randn(
            (count, *vae.latent_shape), generator=streams.generator(seed, purpose), dtype=torch.float32, device="cpu"
        )
    which = {} if component is None else {"component": component}
    number = streams.seed_for(seed, purpose, *which.values())
    return prior.sample(count, seed=(number, 0), **which).view(count, *vae.latent_shape).cpu()


def is_mixture(prior: Prior | None) -> TypeGuard[GaussianMixture | VampPrior]:
    return isinstance(prior, (GaussianMixture, VampPrior))
