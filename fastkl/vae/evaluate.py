"""The figures of a run on held-out data, in nats: ELBO, KL, reconstruction, log p(x); also active units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fastkl
from fastkl import monitors
from fastkl.objectives import sample_kl
from fastkl.objectives._loss import log_prior
from fastkl.priors import MixturePrior, Prior
from fastkl.vae import clusters, streams
from fastkl.vae.data.scaling import Scaling
from fastkl.vae.likelihood import DISCRETE, bits_per_dimension
from fastkl.vae.model import DECODED, ENCODED, VAE
from fastkl.vae.prior import is_mixture

# Limits of the mutual information's estimate: data (it is at most their ln), draws from all posteriors, numbers drawn.
COMPARED, DRAWS, NUMBERS = 1000, 10_000, 2**22


@dataclass(frozen=True)
class Evaluation:
    """Per-datum figures [N], posterior means [N, *latent_shape] and the KL of each latent dimension."""

    reconstruction: Tensor
    kl: Tensor
    log_prob: Tensor
    means: Tensor
    kl_per_dim: Tensor  # to N(0, I): the KL to another prior is not a sum over dimensions
    samples: int
    mutual_information: float  # between data and latent
    # With a mixture prior: bounds on the KL [N], ln p(k | mean) [N, K], and the labels [N], if any.
    bounds: tuple[Tensor, Tensor] | None = None
    responsibilities: Tensor | None = None
    labels: Tensor | None = None
    bits: float | None = None  # -log p(x) in bits per value, for pixels with levels
    errors: tuple[Tensor, Tensor] | None = None  # of images: mean |x - E[x | mean]| and its square [N], over their peak

    @property
    def elbo(self) -> Tensor:
        return self.reconstruction - self.kl

    @property
    def active_units(self) -> int:
        """The number of active units, by `fastkl.monitors.ActiveUnits`."""
        units = monitors.ActiveUnits()
        units.update(self.means)
        return units.count()

    def figures(self) -> dict[str, float]:
        named = {"elbo": self.elbo, "kl": self.kl, "reconstruction": self.reconstruction, "log_prob": self.log_prob}
        means = {name: value.mean().item() for name, value in named.items()}
        errors = {f"{name}_standard_error": value.std().item() / math.sqrt(len(value)) for name, value in named.items()}
        units = {"active_units": self.active_units, "latent_units": self.means[0].numel()}
        return {
            **means, **errors, **units, "mutual_information": self.mutual_information,
            "importance_samples": self.samples, "test_data": len(self.kl),
            **({} if self.bits is None else {"bits_per_dimension": self.bits}), **self.image_figures(),
            **self.mixture_figures(),
        }  # fmt: skip

    def image_figures(self) -> dict[str, float]:
        """Errors of the decoded posterior means: absolute, squared, and the peak signal-to-noise ratio of an image in
        decibels. The range of the values is the unit and the peak."""
        if self.errors is None:
            return {}
        absolute, squared = self.errors
        psnr = -10 * squared.log10()
        return {
            "psnr": psnr.mean().item(), "psnr_standard_error": psnr.std().item() / math.sqrt(len(psnr)),
            "absolute_error": absolute.mean().item(), "squared_error": squared.mean().item(),
        }  # fmt: skip

    def mixture_figures(self) -> dict[str, float]:
        if self.responsibilities is None or self.bounds is None:
            return {}
        lower, upper = (bound.mean().item() for bound in self.bounds)
        figures = {"kl_lower": lower, "kl_upper": upper, **clusters.usage(self.responsibilities)}
        if self.labels is None:
            return figures
        return {**figures, **clusters.agreement(self.responsibilities.argmax(1).numpy(), self.labels.numpy())}


@torch.no_grad()
def quick_elbo(
    vae: VAE, x: Tensor, seed: int, device: torch.device, prior: Prior | None = None, at_most: int = 1000
) -> tuple[float, float, float]:
    """(ELBO, KL, reconstruction) with one sample per datum, for the curves."""
    torch.manual_seed(streams.seed_for(seed, "test"))  # the next training step seeds itself
    totals = torch.zeros(2, dtype=torch.float64, device="cpu")
    x = x[:at_most]
    for part in x.split(max(1, ENCODED // x[0].numel())):
        part = part.to(device)
        z, kl = sample_kl(vae.posterior(part), prior)
        totals += torch.stack([kl.sum(), vae.log_likelihood(z, part).sum()]).double().cpu()
    kl, reconstruction = (totals / len(x)).tolist()
    return reconstruction - kl, kl, reconstruction


@torch.no_grad()
def quick_mixture(
    vae: VAE, x: Tensor, seed: int, device: torch.device, prior: MixturePrior, samples: int = 16, at_most: int = 1000
) -> list[float]:
    """[lower bound, estimate and upper bound of the KL, used components], for the curves."""
    torch.manual_seed(streams.seed_for(seed, "bracket"))
    x, totals, assigned = x[:at_most], torch.zeros(3, dtype=torch.float64, device="cpu"), []
    for part in x.split(max(1, ENCODED // x[0].numel())):
        posterior = vae.posterior(part.to(device))
        lower, upper = prior.kl_bounds(posterior)
        estimate = prior.kl(posterior, num_samples=samples)
        totals += torch.stack([lower.sum(), estimate.sum(), upper.sum()]).double().cpu()
        assigned.append(prior.responsibilities(posterior.mean.flatten(1)).cpu())
    return [*(totals / len(x)).tolist(), clusters.usage(torch.cat(assigned))["used_components"]]


@torch.no_grad()
def evaluate(
    vae: VAE, x: Tensor, samples: int, seed: int, device: torch.device, prior: Prior | None = None,
    labels: Tensor | None = None, scaling: Scaling | None = None,
) -> Evaluation:  # fmt: skip
    """All figures, from one pass with `samples` draws per datum. The reconstruction and the KL to a learned prior are
    means over the draws; the KL to N(0, I) is exact. `scaling` has the range of the values of images, the unit of their
    errors."""
    torch.manual_seed(streams.seed_for(seed, "evaluation"))
    parts: list[tuple[Tensor, ...]] = []
    errors: list[Tensor] = []
    per_dim = torch.zeros(vae.latent_shape, dtype=torch.float64, device="cpu")
    for part in x.split(max(1, ENCODED // x[0].numel())):
        part = part.to(device)
        posterior = vae.posterior(part)
        # Observed once, because all importance weights of a datum need the same x.
        reconstruction, log_prob_x, cross = importance_weighted(vae, vae.observed(part), posterior, samples, prior)
        kl = posterior.kl() if prior is None else -posterior.entropy() - cross
        parts.append((reconstruction, log_prob_x, kl, posterior.mean, posterior.logvar))
        if is_mixture(prior):
            parts[-1] += (*prior.kl_bounds(posterior), prior.responsibilities(posterior.mean.flatten(1)))
        if scaling is not None and len(vae.shape) == 3 and not vae.autoregressive:
            error = ((vae.pictured(posterior.mean).float() - part) / scaling.peak).abs().flatten(1).double()
            errors.append(torch.stack([error.mean(1), error.square().mean(1)]).cpu())
        per_dim += posterior.kl_per_dim().double().cpu() * len(part)
    columns = (torch.cat(column).float().cpu() for column in zip(*parts))
    reconstruction, log_prob_x, kl, means, logvars, *mixture = columns
    information = mutual_information(means, logvars, seed)
    own = (reconstruction, kl, log_prob_x, means, (per_dim / len(x)).float(), samples, information)
    discrete = vae.likelihood in DISCRETE
    bits = bits_per_dimension(log_prob_x.double().mean().item(), vae.shape) if discrete else None
    of_images = (*torch.cat(errors, 1).float(),) if errors else None
    if not mixture:
        return Evaluation(*own, bits=bits, errors=of_images)
    lower, upper, responsibilities = mixture
    return Evaluation(*own, (lower, upper), responsibilities, labels, bits, of_images)


@torch.no_grad()
def mutual_information(means: Tensor, logvars: Tensor, seed: int) -> float:
    """I(x; z) in nats of posteriors [N, *latent_shape], at most ln N, by `fastkl.monitors.MutualInformation`."""
    posterior = fastkl.DiagonalNormal(means[:COMPARED].flatten(1), logvars[:COMPARED].flatten(1))
    draws = max(1, min(DRAWS // len(posterior.mean), NUMBERS // posterior.mean.numel()))
    information = monitors.MutualInformation()
    information.update(posterior, num_samples=draws, seed=(streams.seed_for(seed, "information"), 0))
    return information.compute().item()


def importance_weighted(
    vae: VAE, x: Tensor, posterior: fastkl.DiagonalNormal, samples: int, prior: Prior | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(E_q log p(x | z), log 1/L sum_l p(x, z_l) / q(z_l | x), E_q log p(z)) with L samples, in chunks that bound the
    memory."""
    at_once = max(1, DECODED // (x.numel() * vae.observation.outputs))
    total = torch.full((len(x),), float("-inf"), dtype=torch.float32, device=x.device)
    reconstruction, cross = (torch.zeros(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    for first in range(0, samples, at_once):
        z = posterior.rsample(num_samples=min(at_once, samples - first))
        log_likelihood = vae.log_likelihood(z, x)
        log_p = log_prior(posterior, prior, z)
        weights = log_likelihood + log_p - posterior.log_prob(z)
        total = torch.logaddexp(total, weights.logsumexp(dim=0))
        reconstruction += log_likelihood.sum(dim=0)
        cross += log_p.sum(dim=0)
    return reconstruction / samples, total - math.log(samples), cross / samples
