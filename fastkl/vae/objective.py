"""What a step minimises: one of fastkl.objectives, chosen and set up by the options of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastkl import DiagonalNormal, objectives, remedies
from fastkl.objectives import Discriminator, Loss
from fastkl.priors import Prior
from fastkl.vae.model import VAE
from fastkl.vae.rules import IMPORTANCE, MATCHING
from fastkl.vae.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Noise(NamedTuple):
    """Of one step, where it is not for the op to draw: of the latents [N, L, *latent_shape] and of the choice of a
    component [N, L, K]; the draws from the prior [N, latent] that latents are compared with; and numbers in [0, 1)
    [N, *shape], by which grey values become zeros and ones."""

    eps: Tensor | None = None
    gumbel: Tensor | None = None
    prior_samples: Tensor | None = None
    uniform: Tensor | None = None


class Weights(NamedTuple):
    """What changes from step to step, as tensors, so that a compiled objective stays compiled."""

    beta: Tensor
    tau: Tensor
    capacity: Tensor


class Objective(nn.Module):
    """A module, because DistributedDataParallel hooks into forward(). The discriminator of aae is part of it."""

    def __init__(self, vae: VAE, settings: Settings, dataset_size: int, group: ProcessGroup | None = None):
        super().__init__()
        self.vae, self.settings, self.dataset_size, self.group = vae, settings, dataset_size, group
        self.discriminator = Discriminator(math.prod(vae.latent_shape)) if settings.objective == "aae" else None

    def forward(
        self, x: Tensor, noise: Noise, weights: Weights, learned: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], DiagonalNormal]:
        """(loss, its terms, the posterior without gradient) of a batch; to the learned prior or N(0, I)."""
        posterior = self.vae.posterior(x)
        seen = self.vae.observed(x, noise.uniform)  # once, where the likelihood is of draws

        def log_likelihood(z: Tensor) -> Tensor:
            return self.vae.log_likelihood(z, seen)

        prior = self.vae.prior if learned else None
        loss, terms = self.of(posterior, prior, log_likelihood, noise, weights)
        return loss, terms, DiagonalNormal(posterior.mean.detach(), posterior.logvar.detach())

    def of(
        self, posterior: DiagonalNormal, prior: Prior | None, log_likelihood: objectives.LogLikelihood,
        noise: Noise, weights: Weights,
    ) -> Loss:  # fmt: skip
        settings, problem = self.settings, (posterior, prior, log_likelihood)
        name = settings.objective
        if name == "vade" and prior is None:  # during the warm-up there is no component to choose
            name = "elbo"
        minimise = getattr(objectives, name)
        eps, gumbel = (None if tensor is None else tensor.transpose(0, 1) for tensor in noise[:2])
        if name in IMPORTANCE:
            return minimise(*problem, **importance(settings), eps=eps)
        if name in MATCHING:
            given = {"eps": eps, "prior_samples": noise.prior_samples, "penalty": settings.penalty}
            if name == "aae":
                loss, own = minimise(*problem, self.discriminator, **given)
                return Loss(loss.loss + own, loss.terms)  # neither has a gradient in what the other trains
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

    def distance(self) -> dict[str, Any]:
        """Between latents and draws of the prior, with what --objective says of it."""
        settings = self.settings
        if settings.objective == "swae":
            return {"num_projections": settings.projections}
        if settings.objective == "sinkhorn_ae":
            return {"blur": settings.blur}
        share = {"alpha": settings.alpha} if settings.objective == "info_vae" else {}
        return {"kernel": settings.kernel, "group": self.group, **share}

    def remedy(self, weights: Weights):
        """What stands in the KL's place in the ELBO."""
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
                # 1 at its final value, where balancing ends. By comparison: a quotient may be rounded to below 1.
                beta = (weights.beta >= settings.beta).to(weights.beta.dtype)
                return remedies.balance([part.kl() for part in parts], sizes, beta=beta, group=self.group)

            return balance
        return None


def groups_of(posterior: DiagonalNormal, count: int) -> list[DiagonalNormal]:
    """The posterior's latent dimensions, or channels, in as many groups as even as can be."""
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
    """How many latents a step draws for each datum."""
    if settings.objective in ("miwae", "piwae"):
        return settings.groups * settings.samples
    if settings.objective in IMPORTANCE:
        return settings.samples
    return settings.samples if learned and settings.objective not in (*MATCHING, "beta_tc_vae") else 1
