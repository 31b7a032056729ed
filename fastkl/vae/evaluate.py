"""The figures of a run on data it has not seen: ELBO, KL, reconstruction, log p(x), active units. All in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fastkl
from fastkl.vae import streams
from fastkl.vae.model import VAE

# Values of x at once, encoded and decoded: what bounds the memory of large images, and of 1,000 samples.
ENCODED, DECODED = 2**17, 2**20
ACTIVE = 0.01  # variance of the posterior mean over the data, above which a unit is active


@dataclass(frozen=True)
class Evaluation:
    """Per-datum figures [N], posterior means [N, *latent_shape] and the KL of each latent dimension."""

    reconstruction: Tensor
    kl: Tensor
    log_prob: Tensor
    means: Tensor
    kl_per_dim: Tensor
    samples: int

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl

    @property
    def active_units(self) -> int:
        """Burda, Grosse and Salakhutdinov (2016), section 5.2: Var_x(E[z | x]) > 0.01."""
        return int((self.means.flatten(1).var(dim=0) > ACTIVE).sum())

    def figures(self) -> dict[str, float]:
        named = {"elbo": self.elbo, "kl": self.kl, "reconstruction": self.reconstruction, "log_prob": self.log_prob}
        means = {name: value.mean().item() for name, value in named.items()}
        errors = {f"{name}_standard_error": value.std().item() / math.sqrt(len(value)) for name, value in named.items()}
        units = {"active_units": self.active_units, "latent_units": self.means[0].numel()}
        return {**means, **errors, **units, "importance_samples": self.samples, "test_data": len(self.kl)}


@torch.no_grad()
def quick_elbo(vae: VAE, x: Tensor, seed: int, device: torch.device, at_most: int = 1000) -> tuple[float, float, float]:
    """(ELBO, KL, reconstruction) with one sample per datum: quick, for the curve."""
    torch.manual_seed(streams.seed_for(seed, "test"))  # the next training step seeds itself
    totals = torch.zeros(2, dtype=torch.float64)
    x = x[:at_most]
    for part in x.split(max(1, ENCODED // x[0].numel())):
        part = part.to(device)
        z, kl = vae.posterior(part).rsample_kl()
        totals += torch.stack([kl.sum(), vae.log_likelihood(z, part).sum()]).double().cpu()
    kl, reconstruction = (totals / len(x)).tolist()
    return reconstruction - kl, kl, reconstruction


@torch.no_grad()
def evaluate(vae: VAE, x: Tensor, samples: int, seed: int, device: torch.device) -> Evaluation:
    """All figures from one pass of `samples` draws per datum; the reconstruction is their mean, the KL is exact."""
    torch.manual_seed(streams.seed_for(seed, "evaluation"))
    parts: list[tuple[Tensor, ...]] = []
    per_dim = torch.zeros(vae.latent_shape, dtype=torch.float64)
    for part in x.split(max(1, ENCODED // x[0].numel())):
        part = part.to(device)
        posterior = vae.posterior(part)
        parts.append((*importance_weighted(vae, part, posterior, samples), posterior.kl(), posterior.mean))
        per_dim += posterior.kl_per_dim().double().cpu() * len(part)
    reconstruction, log_prob, kl, means = (torch.cat(column).float().cpu() for column in zip(*parts))
    return Evaluation(reconstruction, kl, log_prob, means, (per_dim / len(x)).float(), samples)


def importance_weighted(vae: VAE, x: Tensor, posterior: fastkl.DiagonalNormal, samples: int) -> tuple[Tensor, Tensor]:
    """(E_q log p(x | z), log 1/L sum_l p(x, z_l) / q(z_l | x)) with L samples, a few of them in memory at a time."""
    at_once = max(1, DECODED // x.numel())
    zero = torch.zeros((), device=x.device)
    total = torch.full((len(x),), float("-inf"), device=x.device)
    reconstruction = torch.zeros(len(x), device=x.device)
    for first in range(0, samples, at_once):
        z = posterior.rsample(num_samples=min(at_once, samples - first))
        log_likelihood = vae.log_likelihood(z, x)
        log_prior = fastkl.normal_log_prob(z, zero, zero, event_ndim=len(vae.latent_shape))
        weights = log_likelihood + log_prior - posterior.log_prob(z)
        total = torch.logaddexp(total, weights.logsumexp(dim=0))
        reconstruction += log_likelihood.sum(dim=0)
    return reconstruction / samples, total - math.log(samples)
