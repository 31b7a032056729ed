"""The loss of a step: one of fastkl.objectives, with the options of the run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkl import DiagonalNormal, objectives, remedies
from fastkl.objectives import Discriminator, Loss
from fastkl.priors import Prior
from fastkl.vae.adversarial import LastLayer, PatchDiscriminator, adaptive_weight, frozen, hinge
from fastkl.vae.errors import UserError
from fastkl.vae.model import VAE
from fastkl.vae.perceptual import Perceptual
from fastkl.vae.prior import rsample
from fastkl.vae.rules import IMPORTANCE, MATCHING
from fastkl.vae.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Noise(NamedTuple):
    """Noise of one training step that is drawn outside the ops. Noise that is None is drawn there."""

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
    """The loss as a module, because DistributedDataParallel needs a forward(). It owns the discriminator of aae, or of
    image patches."""

    def __init__(
        self, vae: VAE, settings: Settings, dataset_size: int, group: ProcessGroup | None = None,
        own: Callable[..., Loss] | None = None, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.own = own
        self.vae, self.settings, self.dataset_size, self.group = vae, settings, dataset_size, group
        self.discriminator: nn.Module | None = None
        if settings.objective == "aae":
            self.discriminator = Discriminator(math.prod(vae.latent_shape))
        if settings.adversarial:
            self.discriminator, self.last_layer = PatchDiscriminator(vae.shape), LastLayer(vae.decoder)
        if vae.autoregressive and (settings.adversarial or settings.perceptual):
            option = "--adversarial" if settings.adversarial else "--perceptual"
            raise UserError(f"{option} needs decoded images, and --model {settings.model} predicts one pixel at a time")
        self.perceptual = None
        if settings.perceptual:
            self.perceptual = Perceptual(settings.perceptual, vae.shape, device or torch.device("cpu"))

    def forward(
        self, x: Tensor, noise: Noise, weights: Weights, learned: bool = False, adversarial: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], DiagonalNormal]:
        """(loss, its terms, the posterior without gradient) of a batch; with the learned prior if `learned`, and with
        the discriminator of patches if `adversarial`."""
        posterior = self.vae.posterior(x)
        observed = self.vae.observed(x, noise.uniform)  # binarised once, so that all samples share it

        def log_likelihood(z: Tensor) -> Tensor:
            return self.vae.log_likelihood(z, observed)

        prior = self.vae.prior if learned else None
        if self.perceptual is None and not adversarial:
            loss, terms = self.of(posterior, prior, log_likelihood, noise, weights)
        else:
            loss, terms = self.of_images(posterior, prior, observed, noise, weights, adversarial)
        return loss, terms, DiagonalNormal(posterior.mean.detach(), posterior.logvar.detach())

    def of(
        self, posterior: DiagonalNormal, prior: Prior | None, log_likelihood: objectives.LogLikelihood,
        noise: Noise, weights: Weights,
    ) -> Loss:  # fmt: skip
        """The loss of the run's objective, with its options."""
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

    def of_images(
        self, posterior: DiagonalNormal, prior: Prior | None, x: Tensor, noise: Noise, weights: Weights,
        adversarial: bool,
    ) -> Loss:  # fmt: skip
        """The loss with the terms that compare images: the perceptual distance, and the discriminator's.

        The discriminator's own loss is part of the sum: the decoder's has no gradient in the discriminator, and the
        discriminator's has gradients only there.
        """
        settings, outputs = self.settings, []

        def log_likelihood(z: Tensor) -> Tensor:
            outputs.append(self.vae.decode(z, x).float())
            return self.vae.scored(outputs[-1], x)

        nothing: contextlib.AbstractContextManager[list[Tensor]] = contextlib.nullcontext([])
        with self.last_layer.watched() if adversarial else nothing as call:
            loss, terms = self.of(posterior, prior, log_likelihood, noise, weights)
            slope, shift = self.vae.signed
            x_hat = self.vae.image(outputs[-1])
            truth = (slope * x + shift).expand_as(x_hat).flatten(0, -4)
            x_hat = x_hat.flatten(0, -4)
            if self.perceptual is not None:
                distance = self.perceptual(x_hat, truth).mean()
                loss = loss + settings.perceptual_weight * distance
                terms = {**terms, "perceptual": distance.detach()}
            if not adversarial:
                return Loss(loss, terms)
            assert self.discriminator is not None
            fooled = -frozen(self.discriminator, x_hat).float().mean()
            norms = (self.last_layer.gradient_norm(each, outputs[-1], call, self.group) for each in (loss, fooled))
            weight = settings.adversarial_weight * adaptive_weight(*norms)
        of_data, of_model = (self.discriminator(images).float() for images in (truth, x_hat.detach()))
        own = hinge(of_data, of_model)
        right = torch.cat([(of_data > 0).flatten(), (of_model < 0).flatten()]).float().mean()
        more = {"adversarial": fooled, "adversarial_weight": weight, "discriminator": own, "accuracy": right}
        terms = {**terms, **{name: value.detach() for name, value in more.items()}}
        return Loss(loss + weight * fooled + own, terms)

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
    """Arguments of the importance-weighted objectives."""
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
