"""Shared parts of objectives: their result, draws from posterior and prior, and the KL by samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl import distributions
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._sampling import Seed
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.ops.normal.rsample_normal import draw_normal
from fastkl.priors._prior import Prior
from fastkl.reference import Stream

LogLikelihood = Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """The result of an objective.

    loss: the scalar to minimise, the mean over the batch. terms: its parts, scalars without gradient, means over the
    batch in nats (distances: in the units of the distance), in the order of a log.
    """

    loss: Tensor
    terms: dict[str, Tensor]


def made_of(loss: Tensor, **terms: Tensor) -> Loss:
    return Loss(loss, {name: term.detach().mean() for name, term in terms.items()})


def check(posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood) -> None:
    if not isinstance(posterior, distributions.DiagonalNormal):
        raise TypeError(f"posterior must be a fastkl.DiagonalNormal, got {type(posterior).__name__}")
    if len(posterior.shape) == posterior.event_ndim:
        raise ValueError(f"posterior must have a batch dimension, got {posterior}")
    if not (prior is None or hasattr(prior, "log_prob")):
        raise TypeError(f"prior must be one of fastkl.priors or None for N(0, I), got {type(prior).__name__}")
    if not callable(log_likelihood):
        raise TypeError(f"log_likelihood must be callable, z -> ln p(x | z), got {type(log_likelihood).__name__}")


def flat(posterior: distributions.DiagonalNormal, z: Tensor) -> Tensor:
    """z with its event flattened [..., D], the form of priors and matching distances."""
    return z.flatten(z.dim() - posterior.event_ndim) if posterior.event_ndim else z.unsqueeze(-1)


def check_noise(posterior: distributions.DiagonalNormal, num_samples: int, eps: Tensor | None) -> None:
    num_samples = arguments.check_int("num_samples", num_samples, 1)
    arguments.check_tensors(eps=eps)
    if eps is not None and eps.shape != (wanted := (num_samples, *posterior.shape)):
        raise ValueError(f"eps must be the noise of {num_samples} samples, {tuple(wanted)}, got {tuple(eps.shape)}")


def draws(posterior: distributions.DiagonalNormal, num_samples: int, eps: Tensor | None) -> Tensor:
    """z [num_samples, *batch, *event], with the noise eps if given."""
    check_noise(posterior, num_samples, eps)
    return posterior.rsample(num_samples=num_samples, eps=eps)


def prior_draws(
    posterior: distributions.DiagonalNormal, prior: Prior | None, given: Tensor | None, seed: Seed | None = None
) -> Tensor:  # fmt: skip
    """Draws from the prior [N, D], one per datum of the batch, with gradients to a learned prior's parameters."""
    batch_ndim = len(posterior.shape) - posterior.event_ndim
    shape = torch.Size((math.prod(posterior.shape[:batch_ndim]), math.prod(posterior.shape[batch_ndim:])))
    if given is not None:
        arguments.check_tensors(prior_samples=given)
        if given.shape[1:] != shape[1:] or given.dim() != 2:
            raise ValueError(f"prior_samples must be draws from the prior (n, {shape[1]}), got {tuple(given.shape)}")
        return given
    if prior is not None:
        return prior.rsample(shape[0], seed=seed)
    zero = torch.zeros((), dtype=torch.float32, device=posterior.mean.device)
    seed = sampling.check_seed(seed, zero.device, "posterior")
    return draw_normal(Stream.PRIOR, shape, zero, zero, seed)


def log_prior(posterior: distributions.DiagonalNormal, prior: Prior | None, z: Tensor) -> Tensor:
    """ln p(z) [..., *batch] of z [..., *batch, *event]."""
    if prior is None:
        zero = torch.zeros((), dtype=torch.float32, device=z.device)
        return normal_log_prob(z, zero, zero, event_ndim=posterior.event_ndim)
    return prior.log_prob(flat(posterior, z))


def has_closed_form(prior: Prior | None) -> bool:
    """Whether KL(q || p) has a closed form, because p is one Gaussian."""
    return prior is None or "closed" in getattr(prior, "methods", ())


def sampled_kl(posterior: distributions.DiagonalNormal, prior: Prior | None, z: Tensor) -> Tensor:
    """KL(q || p) [*batch], in closed form if p is Gaussian, else by draws z [L, *batch, *event]."""
    if has_closed_form(prior):
        return posterior.kl() if prior is None else prior.kl(posterior)
    # The closed form of E_q[ln q] is less noisy than its mean over the draws.
    return -posterior.entropy() - log_prior(posterior, prior, z).mean(dim=0)


def reconstruction_of(posterior: distributions.DiagonalNormal, log_likelihood: LogLikelihood, z: Tensor) -> Tensor:
    """ln p(x | z), one value for each z."""
    out = log_likelihood(z)
    expected = z.shape[: z.dim() - posterior.event_ndim]
    if not isinstance(out, Tensor) or out.shape != expected:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"log_likelihood(z) must be one value per datum, {tuple(expected)}, got {got}")
    return out
