"""The loss of a step: one of fastkl.objectives, with the options of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastkl import DiagonalNormal, objectives, remedies
from fastkl.objectives import Discriminator, Loss
from fastkl.priors import Prior
from fastkl.vae.model import VAE
from fastkl.vae.prior import rsample
from fastkl.vae.rules import IMPORTANCE, MATCHING
from fastkl.vae.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Noise(NamedTuple):
    """Noise of one training step, given instead of drawn inside the op."""

    eps: Tensor | None = None  # of the latents [N, L, *latent_shape]
    gumbel: Tensor | None = None  # of the choice of a component [N, L, K]
    uniform: Tensor | None = None  # in [0, 1) [N, *shape], to binarise grey values
    # Seed of the draws from the prior that are compared with the latents. The draws are of the whole batch, over all
    # processes: its size and this process's rows.
    prior_seed: Tensor | None = None
    prior_rows: tuple[int, slice] | None = None


class Weights(NamedTuple):
    """Scheduled weights, as tensors: a compiled objective is not recompiled for new values."""

    beta: Tensor
    tau: Tensor
    capacity: Tensor


class Objective(nn.Module):
    """The loss as a module, because DistributedDataParallel needs a forward(). It owns the discriminator of aae."""

    def __init__(
        self, vae: VAE, settings: Settings, dataset_size: int, group: ProcessGroup | None = None,
        own: Callable[..., Loss] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.own = own
        self.vae, self.settings, self.dataset_size, self.group = vae, settings, dataset_size, group
        self.discriminator = Discriminator(math.prod(vae.latent_shape)) if settings.objective == "aae" else None

    def forward(
        self, x: Tensor, noise: Noise, weights: Weights, learned: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], DiagonalNormal]:
        """(loss, its terms, the posterior without gradient) of a batch; with the learned prior if `learned`."""
        posterior = self.vae.posterior(x)
        observed = self.vae.observed(x, noise.uniform)  # binarised once, so that all samples share it

        def log_likelihood(z: Tensor) -> Tensor:
            return self.vae.log_likelihood(z, observed)

        prior = self.vae.prior if learned else None
        loss, terms = self.of(posterior, prior, log_likelihood, noise, weights)
        return loss, terms, DiagonalNormal(posterior.mean.detach(), posterior.logvar.detach())

    def of(
        self, posterior: DiagonalNormal, prior: Prior | None, log_likelihood: objectives.LogLikelihood,
        noise: Noise, weights: Weights,
    ) -> Loss:  # fmt: skip
        settings, problem = self.settings, (posterior, prior, log_likelihood)
        if self.own is not None:
            return self.own(*problem)
        name = settings.objective
        if name == "vade" and prior is None:  # N(0, I) during the warm-up has no components
            name = "elbo"
        minimise = getattr(objectives, name)
        eps, gumbel = (None if tensor is None else tensor.transpose(0, 1) for tensor in noise[:2])
        if name in IMPORTANCE:
            return minimise(*problem, **importance(settings), eps=eps)
        if name in MATCHING:
            given = {"eps": eps, "prior_samples": self.prior_samples(prior, noise), "penalty": settings.penalty}
            if name == "aae":
                loss, own = minimise(*problem, self.discriminator, **given)
                return Loss(loss.loss + own, loss.terms)  # the two losses have gradients in disjoint parameters
            return minimise(*problem, **given, **self.distance())
        if name == "beta_tc_vae":
            estimate = {"dataset_size": self.dataset_size, "weights": settings.weights, "group": self.group}
            return minimise(*problem, beta=weights.beta, **estimate, eps=eps)
        samples = 1 if prior is None else settings.samples
        if name == "vade":
            return minimise(*problem, beta=weights.beta, num_samples=samples, eps=eps)
        kl = {"method": settings.kl, "num_samples": samples, "tau": weights.tau, "eps": eps, "gumbel": gumbel}
        if name == "beta_vae":
            capacity = weights.capacity if settings.capacity >= 0 else None
            return minimise(*problem, beta=weights.beta, capacity=capacity, **kl)
        return minimise(*problem, beta=weights.beta, remedy=self.remedy(weights), **kl)

    def prior_samples(self, prior: Prior | None, noise: Noise) -> Tensor | None:
        """Draws from the prior [N, latent] for the rows of this process, the same for every number of processes."""
        if noise.prior_seed is None or noise.prior_rows is None:
            return None
        count, rows = noise.prior_rows
        return rsample(prior, self.vae, count, noise.prior_seed)[rows]

    def distance(self) -> dict[str, Any]:
        """Arguments of the distance between latents and draws of the prior."""
        settings = self.settings
        if settings.objective == "swae":
            return {"num_projections": settings.projections}
        if settings.objective == "sinkhorn_ae":
            return {"blur": settings.blur}
        share = {"alpha": settings.alpha} if settings.objective == "info_vae" else {}
        return {"kernel": settings.kernel, "group": self.group, **share}

    def remedy(self, weights: Weights):
        """The function that replaces the KL in the ELBO, or None."""
        settings = self.settings
        if settings.free_bits:
            per = settings.free_bits_per

            def free_bits(posterior: DiagonalNormal, kl: Tensor) -> Tensor:
                if per == "sample":
                    return remedies.free_bits(kl, settings.free_bits)
                group = self.group if per == "batch" else None
                return remedies.free_bits(posterior, settings.free_bits, per=per, group=group)

            return free_bits
        if settings.balance:

            def balance(posterior: DiagonalNormal, kl: Tensor) -> Tensor:
                parts = groups_of(posterior, settings.balance)
                sizes = [part.shape[1:].numel() for part in parts]
                # 1 once beta has its final value, which ends balancing. A quotient could be rounded to below 1.
                beta = (weights.beta >= settings.beta).to(weights.beta.dtype)
                return remedies.balance([part.kl() for part in parts], sizes, beta=beta, group=self.group)

            return balance
        return None


def groups_of(posterior: DiagonalNormal, count: int) -> list[DiagonalNormal]:
    """The posterior's latent dimensions, or channels, split into `count` groups of nearly equal size."""
    parameters = zip(posterior.mean.tensor_split(count, 1), posterior.logvar.tensor_split(count, 1))
    return [DiagonalNormal(mu, logvar) for mu, logvar in parameters]


def importance(settings: Settings) -> dict[str, Any]:
    given = {"num_samples": settings.samples, "gradient": settings.gradient}
    if settings.objective in ("miwae", "piwae"):
        given["num_estimates"] = settings.groups
    if settings.objective == "ciwae":
        given["beta"] = settings.elbo_share
    return given


def draws_of(settings: Settings, learned: bool) -> int:
    """The number of latents that a step draws per datum."""
    if settings.objective in ("miwae", "piwae"):
        return settings.groups * settings.samples
    if settings.objective in IMPORTANCE:
        return settings.samples
    return settings.samples if learned and settings.objective not in (*MATCHING, "beta_tc_vae") else 1
