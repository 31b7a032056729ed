"""The prior of a run: how it is made, how it begins, and the KL to it. None stands for N(0, I), in closed form.

During the KL warm-up every run has N(0, I): a mixture that starts on posteriors which mean nothing yet leaves most of
its components unused. Then a mixture is fitted to the posteriors as they are, pseudo-inputs are encoded by what the
encoder has learned, a flow starts near the identity, and all of them train jointly with the rest.
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
from fastkl.vae.model import ENCODED, VAE
from fastkl.vae.settings import Settings

# Draws from the posteriors that a mixture is fitted to, and how many numbers they may be.
DRAWS, NUMBERS = 20_000, 2**25
LARGEST = 1024  # latent, where each component has a matrix of it, or each transform of a flow


def build(settings: Settings, vae: VAE, data: Data) -> Prior | None:
    """The prior as it is before it begins."""
    dim = math.prod(vae.latent_shape)
    large = "--prior flow" if settings.prior == "flow" else f"--covariance {settings.covariance}"
    if large in ("--prior flow", "--covariance full") and dim > LARGEST:
        raise UserError(f"{large} is made for latents of at most {LARGEST} numbers, this one has {dim}: --prior gmm")
    if settings.prior == "gmm":
        if settings.components > len(data.train):
            raise UserError(f"--components {settings.components} is more than the {len(data.train)} training data")
        return GaussianMixture(settings.components, dim, settings.covariance)
    if settings.prior == "vamp":
        return VampPrior(pseudo_inputs(settings, data), vae.encoder, transform=whole(data))
    if settings.prior == "flow":
        zuko = require("zuko", "--prior flow")
        # Splines move a number by as much as they like and leave what is beyond 5 deviations alone.
        return FlowPrior(zuko.flows.NSF(dim, transforms=2, hidden_features=(64, 64)))
    return None


def pseudo_inputs(settings: Settings, data: Data) -> Tensor:
    """Training data, no two the same unless more are wanted than there are."""
    generator = streams.generator(settings.seed, "pseudo-inputs")
    count = len(data.train)
    order = [
        torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")
        for _ in range(1 + settings.components // count)
    ]
    return data.train[torch.cat(order)[: settings.components]]


def whole(data: Data) -> nn.Module | None:
    """Keeps pseudo-inputs that are probabilities in their range."""
    # Not Hardtanh as in the paper: where a pixel is 0 or 1, as most are, it has no gradient that leads back inside.
    return Inside() if data.likelihood == "bernoulli" else None


class Inside(nn.Module):
    """Values clamped to [0, 1]; the gradient is let through."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.clamp(0, 1) - x).detach()


@torch.no_grad()
def begin(prior: nn.Module, vae: VAE, data: Data, settings: Settings, device: torch.device) -> None:
    """Fit a mixture to the posteriors of the training data; other priors begin as they were built.

    First to the posterior means, where the clusters are; then, from those centres, to draws from the posteriors: the
    best prior is the average posterior, whose width the means do not have. (A dimension that carries nothing has means
    near 0 and posteriors of variance 1, and a mixture of the means alone would be absurdly narrow there.)
    """
    if not isinstance(prior, GaussianMixture):
        return
    seed = streams.seed_for(settings.seed, "fit")
    torch.manual_seed(seed)  # the next training step seeds itself
    rows = max(settings.components, min(DRAWS, NUMBERS // math.prod(vae.latent_shape)))
    x = data.train[:rows]  # which the split has shuffled
    draws = max(1, rows // len(x))
    means, drawn = [], []
    for part in x.split(max(1, ENCODED // x[0].numel())):
        posterior = vae.posterior(part.to(device))
        means.append(posterior.mean.flatten(1))
        drawn.append(posterior.rsample(num_samples=draws).flatten(2).transpose(0, 1).flatten(0, 1))
    try:
        prior.fit(torch.cat(means), seed=seed, regularisation=1e-4)
        prior.fit(torch.cat(drawn), init=prior.means, regularisation=1e-4)
    except ValueError as error:
        raise UserError(f"--prior gmm cannot be fitted to the posteriors: {error}") from None


def rsample(prior: Prior | None, vae: VAE, count: int, *seeds: int) -> Tensor:
    """The same draws [count, latent] on every process, with gradients to a learned prior."""
    seed, dim = streams.seed_for(seeds[0], "prior", *seeds[1:]), math.prod(vae.latent_shape)
    return (StandardNormal(dim) if prior is None else prior).rsample(count, seed=seed)


def draw(prior: Prior | None, vae: VAE, count: int, seed: int, purpose: str, component: int | None = None) -> Tensor:
    """Latents [count, *latent_shape] from the prior, or from one of its components, on the CPU."""
    if prior is None:
        return torch.randn(
            (count, *vae.latent_shape), generator=streams.generator(seed, purpose), dtype=torch.float32, device="cpu"
        )
    which = {} if component is None else {"component": component}
    seed = streams.seed_for(seed, purpose, *which.values())
    return prior.sample(count, seed=seed, **which).view(count, *vae.latent_shape).cpu()


def is_mixture(prior: Prior | None) -> TypeGuard[GaussianMixture | VampPrior]:
    return isinstance(prior, (GaussianMixture, VampPrior))
