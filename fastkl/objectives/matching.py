"""Objectives that match the aggregate posterior, q(z) = E_x q(z | x), to the prior by draws from both.

They compare one draw per datum with as many draws from the prior, instead of each posterior with the prior. A learned
prior gets its gradient through its draws (`prior.rsample`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkl import distributions
from fastkl.objectives._loss import (
    LogLikelihood,
    Loss,
    check,
    draws,
    flat,
    made_of,
    prior_draws,
    reconstruction_of,
    sampled_kl,
)
from fastkl.ops._arguments import check_number, check_weight
from fastkl.ops.pairs.mmd import mmd
from fastkl.priors._prior import Prior

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def wae_mmd(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *,
    penalty: float | Tensor = 10.0, kernel: str = "imq", eps: Tensor | None = None,
    prior_samples: Tensor | None = None, group: ProcessGroup | None = None, **settings: Any,
) -> Loss:  # fmt: skip
    """The Wasserstein autoencoder with a maximum mean discrepancy.

    -E_q[ln p(x | z)] + lambda MMD^2(q(z), p(z))

    Args:
        posterior, prior, log_likelihood: as for `elbo`; N data, latents of D numbers.
        penalty: lambda, a number or a tensor with one value.
        kernel, settings: `fastkl.mmd`'s kernel, scales and estimator.
        eps: the noise of z [1, *batch, *event]; None draws it.
        prior_samples: draws from the prior [n, D]; None draws one per datum.
        group: a torch.distributed process group, over which the batch is split; the comparison is of the whole batch.

    Returns:
        Loss(loss, terms): terms are reconstruction, kl (for the log only: it is not in the loss) and mmd.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; the message names it.

    Source: Tolstikhin et al. 2018, "Wasserstein Auto-Encoders", arXiv:1711.01558, algorithm 2.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.randn(64, 2), torch.zeros(64, 2))
    >>> list(fastkl.objectives.wae_mmd(q, None, lambda z: z.sum(-1)).terms)
    ['reconstruction', 'kl', 'mmd']
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return mmd(x, y, kernel=kernel, group=group, **settings)

    return matched("mmd", distance, posterior, prior, log_likelihood, penalty, eps, prior_samples)


def info_vae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *,
    alpha: float = 0.0, penalty: float = 10.0, kernel: str = "imq", eps: Tensor | None = None,
    prior_samples: Tensor | None = None, group: ProcessGroup | None = None, **settings: Any,
) -> Loss:  # fmt: skip
    """The InfoVAE: the ELBO with a share of its KL replaced by a maximum mean discrepancy, so z keeps more of x.

    -E_q[ln p(x | z)] + (1 - alpha) KL(q(z | x) || p(z)) + (alpha + lambda - 1) MMD^2(q(z), p(z))

    Args:
        alpha: the share of the KL that is left out: at 0 the full KL stays, at 1 the loss is `wae_mmd` of the same
            penalty.
        penalty: lambda, a number. The other arguments: as for `wae_mmd`.

    Returns:
        Loss(loss, terms): terms are reconstruction, kl and mmd.

    Raises:
        ValueError: alpha > 1, or alpha + lambda < 1, with which a term would be maximised. And as `wae_mmd`.

    Source: Zhao, Song and Ermon 2019, "InfoVAE", arXiv:1706.02262, equation 6.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.ones(64, 2), torch.zeros(64, 2))
    >>> loss, terms = fastkl.objectives.info_vae(q, None, lambda z: 0 * z.sum(-1), alpha=0.5, penalty=2.0)
    >>> bool(torch.isclose(loss, 0.5 * terms["kl"] + 1.5 * terms["mmd"]))
    True
    """
    alpha, penalty = check_number("alpha", alpha), check_number("penalty", penalty)
    if alpha > 1 or alpha + penalty < 1:
        raise ValueError(f"alpha must be at most 1, and alpha + penalty at least 1, got {alpha} and {penalty}")

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return mmd(x, y, kernel=kernel, group=group, **settings)

    given = (eps, prior_samples)
    return matched("mmd", distance, posterior, prior, log_likelihood, alpha + penalty - 1, *given, kl_weight=1 - alpha)


def matched(
    name: str, distance: Callable[[Tensor, Tensor], Tensor], posterior: distributions.DiagonalNormal,
    prior: Prior | None, log_likelihood: LogLikelihood, penalty: float | Tensor, eps: Tensor | None,
    prior_samples: Tensor | None, kl_weight: float = 0.0,
) -> Loss:  # fmt: skip
    """The loss with a distance between latents and draws of the prior, in the terms as `name`."""
    check(posterior, prior, log_likelihood)
    penalty = check_weight("penalty", penalty)
    z = draws(posterior, 1, eps)
    reconstruction = reconstruction_of(posterior, log_likelihood, z)[0]
    with torch.set_grad_enabled(kl_weight > 0 and torch.is_grad_enabled()):
        kl = sampled_kl(posterior, prior, z)
    rows = flat(posterior, z).flatten(0, -2)
    value = distance(rows, prior_draws(posterior, prior, prior_samples))
    loss = penalty * value - reconstruction.mean()
    loss = loss + kl_weight * kl.mean() if kl_weight > 0 else loss
    return made_of(loss, reconstruction=reconstruction, kl=kl, **{name: value})
