"""The evidence lower bound, optionally with a remedy in the place of its KL."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastkl import distributions, remedies
from fastkl.objectives._loss import (
    LogLikelihood,
    Loss,
    check,
    check_noise,
    draws,
    flat,
    has_closed_form,
    made_of,
    reconstruction_of,
    sampled_kl,
)
from fastkl.ops import _arguments as arguments
from fastkl.ops._arguments import check_weight
from fastkl.priors._prior import Prior

# (posterior, KL [*batch]) -> the loss's replacement of the KL: a value for each datum, or one for the batch.
Remedy = Callable[[distributions.DiagonalNormal, Tensor], Tensor]
METHODS = ("mc", "upper", "relaxed")


def sample_kl(
    posterior: distributions.DiagonalNormal, prior: Prior | None = None, *, method: str = "mc", num_samples: int = 1,
    tau: float | Tensor = 1.0, eps: Tensor | None = None, gumbel: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z [*batch, *event], KL(q || p) [*batch] in nats); z is the first draw of the KL's estimate.

    Args:
        prior: one of fastkl.priors, or None for N(0, I), whose KL has a closed form.
        method: "mc", by draws; for a mixture also "upper" or "relaxed", as in its `kl`.
        eps: the noise [num_samples, *batch, *event]; None draws it.
        gumbel: for "relaxed", the noise of the component's choice at temperature tau [num_samples, *batch, K].

    Raises:
        TypeError, ValueError: as `fastkl.DiagonalNormal.rsample_kl` and the prior's `kl`.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.ones(2, 3), torch.zeros(2, 3))
    >>> fastkl.objectives.sample_kl(q)[1]
    tensor([1.5000, 1.5000])
    """
    if prior is None:
        check_noise(posterior, num_samples, eps)
        return posterior.rsample_kl(eps=None if eps is None else eps[0])
    arguments.check_choice("method", method, METHODS)
    z = draws(posterior, num_samples, eps)
    if has_closed_form(prior) or method == "mc":
        return z[0], sampled_kl(posterior, prior, z)
    if method == "relaxed":
        return z[0], prior.kl_relaxed(posterior, flat(posterior, z), tau, gumbel=gumbel)
    return z[0], prior.kl(posterior, method=method)


def elbo(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *,
    beta: float | Tensor = 1.0, method: str = "mc", num_samples: int = 1, tau: float | Tensor = 1.0,
    remedy: Remedy | None = None, eps: Tensor | None = None, gumbel: Tensor | None = None,
) -> Loss:  # fmt: skip
    """Minus the evidence lower bound, mean over the batch.

    -E_q[ln p(x | z)] + beta KL(q(z | x) || p(z)), with one z per datum for the decoder

    Args:
        posterior: q(z | x), a fastkl.DiagonalNormal with a batch dimension.
        prior: one of fastkl.priors, or None for N(0, I).
        log_likelihood: z -> ln p(x | z) in nats, one value per datum.
        beta: weight of the KL, a number or a tensor with one value (a tensor can be scheduled without recompiling).
        method, num_samples, tau, eps, gumbel: for the KL to a learned prior, as in `sample_kl`.
        remedy: a function of the posterior and the KL [*batch] that replaces the KL in the loss, for instance
            `lambda q, kl: fastkl.remedies.free_bits(kl, 2.0)`. The terms keep the KL itself.

    Returns:
        Loss(loss, terms): terms are elbo, reconstruction and kl, and penalty with a remedy.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; the message names it.

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114, equation 3.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2))
    >>> loss, terms = fastkl.objectives.elbo(q, None, lambda z: -0.5 * (z - z.detach() + 1).square().sum(-1))
    >>> round(loss.item(), 4), list(terms)
    (1.0, ['elbo', 'reconstruction', 'kl'])
    """
    check(posterior, prior, log_likelihood)
    beta = check_weight("beta", beta)
    if not (remedy is None or callable(remedy)):
        raise TypeError(f"remedy must be callable, (posterior, kl) -> penalty, got {type(remedy).__name__}")
    z, kl = sample_kl(posterior, prior, method=method, num_samples=num_samples, tau=tau, eps=eps, gumbel=gumbel)
    reconstruction = reconstruction_of(posterior, log_likelihood, z)
    terms = {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}
    if remedy is None:
        return made_of((beta * kl - reconstruction).mean(), **terms)
    penalty = remedy(posterior, kl)
    return made_of(beta * penalty.mean() - reconstruction.mean(), **terms, penalty=penalty)


def beta_vae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *,
    beta: float | Tensor = 4.0, capacity: float | Tensor | None = None, **settings,
) -> Loss:  # fmt: skip
    """The beta-VAE: the ELBO with a weighted KL, or with a target for the KL.

    -E_q[ln p(x | z)] + beta KL, or with a capacity C in nats: -E_q[ln p(x | z)] + beta |KL - C|, for each datum

    Args:
        beta: the weight (with a capacity, the paper's gamma, 1,000 there).
        capacity: the target C; a number, or a tensor that rises over the run (`fastkl.schedules.linear`).
        settings: method, num_samples, tau, eps, gumbel, as for `elbo`.

    Returns, Raises: as `elbo`.

    Source: Higgins et al. 2017, "beta-VAE", equation 4; Burgess et al. 2018, "Understanding disentangling in
    beta-VAE", arXiv:1804.03599, equation 8.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.ones(4, 2), torch.zeros(4, 2))
    >>> fastkl.objectives.beta_vae(q, None, lambda z: z.sum(-1) * 0, beta=10.0, capacity=0.5).loss
    tensor(5.)
    """
    remedy = None
    if capacity is not None:
        capacity = check_weight("capacity", capacity)

        def remedy(posterior: distributions.DiagonalNormal, kl: Tensor) -> Tensor:
            return remedies.capacity(kl, capacity)

    return elbo(posterior, prior, log_likelihood, beta=beta, remedy=remedy, **settings)
