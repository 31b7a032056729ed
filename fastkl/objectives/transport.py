"""Autoencoders that match latents to the prior by optimal transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastkl import distributions
from fastkl.objectives._loss import LogLikelihood, Loss
from fastkl.objectives.matching import matched
from fastkl.ops._sampling import Seed
from fastkl.ops.transport.sinkhorn_divergence import sinkhorn_divergence
from fastkl.ops.transport.sliced_wasserstein import sliced_wasserstein
from fastkl.priors._prior import Prior

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def swae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *,
    penalty: float | Tensor = 10.0, num_projections: int = 50, p: float = 2, eps: Tensor | None = None,
    prior_samples: Tensor | None = None, seed: Seed | None = None,
) -> Loss:  # fmt: skip
    """The sliced-Wasserstein autoencoder.

    -E_q[ln p(x | z)] + lambda SW_p^p(q(z), p(z))

    Args:
        penalty: lambda. num_projections, p, seed: as for `fastkl.sliced_wasserstein`. The others: as for `wae_mmd`.

    Returns:
        Loss(loss, terms): terms are reconstruction, kl (for the log only) and sliced_wasserstein.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; the message names it.

    Source: Kolouri et al. 2019, "Sliced Wasserstein Auto-Encoders", arXiv:1804.01947, equation 13.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.randn(64, 2), torch.zeros(64, 2))
    >>> list(fastkl.objectives.swae(q, None, lambda z: z.sum(-1)).terms)
    ['reconstruction', 'kl', 'sliced_wasserstein']
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return sliced_wasserstein(x, y, num_projections, p=p, seed=seed)

    return matched("sliced_wasserstein", distance, posterior, prior, log_likelihood, penalty, eps, prior_samples)


def sinkhorn_ae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *,
    penalty: float | Tensor = 10.0, blur: float = 0.5, eps: Tensor | None = None,
    prior_samples: Tensor | None = None, group: ProcessGroup | None = None, **settings: Any,
) -> Loss:  # fmt: skip
    """The Sinkhorn autoencoder.

    -E_q[ln p(x | z)] + lambda S_blur(q(z), p(z))

    Args:
        penalty: lambda. blur, group, settings: as for `fastkl.sinkhorn_divergence`. The others: as for `wae_mmd`.

    Returns:
        Loss(loss, terms): terms are reconstruction, kl (for the log only) and sinkhorn_divergence.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; the message names it.

    Source: Patrini et al. 2019, "Sinkhorn AutoEncoders", arXiv:1810.01118, section 4; Genevay, Peyre and Cuturi 2018,
    arXiv:1706.00292 (the debiased divergence).

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.randn(64, 2), torch.zeros(64, 2))
    >>> list(fastkl.objectives.sinkhorn_ae(q, None, lambda z: z.sum(-1)).terms)
    ['reconstruction', 'kl', 'sinkhorn_divergence']
    """

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return sinkhorn_divergence(x, y, blur, group=group, **settings)

    return matched("sinkhorn_divergence", distance, posterior, prior, log_likelihood, penalty, eps, prior_samples)
