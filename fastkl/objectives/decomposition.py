"""The beta-TCVAE: the KL decomposed into three weighted parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkl import distributions
from fastkl.objectives._loss import LogLikelihood, Loss, check, draws, flat, made_of, reconstruction_of
from fastkl.ops._arguments import check_weight
from fastkl.ops.pairs.total_correlation import total_correlation
from fastkl.priors import StandardNormal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def beta_tc_vae(
    posterior: distributions.DiagonalNormal, prior: StandardNormal | None, log_likelihood: LogLikelihood, *,
    dataset_size: int, beta: float | Tensor = 6.0, alpha: float | Tensor = 1.0, gamma: float | Tensor = 1.0,
    weights: str = "mss", eps: Tensor | None = None, group: ProcessGroup | None = None,
) -> Loss:  # fmt: skip
    """The beta-TCVAE: the KL in three weighted parts.

    -E_q[ln p(x | z)] + alpha I(z; x) + beta TC(z) + gamma sum_d KL(q(z_d) || p(z_d))

    Args:
        posterior, log_likelihood: as for `elbo`.
        prior: None or StandardNormal; the third part needs a prior that factorises over dimensions.
        dataset_size: size of the data set from which the batch is drawn.
        beta, alpha, gamma: numbers or tensors with one value.
        weights, group: as for `fastkl.total_correlation`.
        eps: the noise of z [1, *batch, *event]; None draws it.

    Returns:
        Loss(loss, terms): terms are reconstruction, kl (the sum of the three, the sampled KL), mutual_information,
        total_correlation and dimension_wise_kl, in nats.

    Raises:
        TypeError: prior is neither None nor StandardNormal. TypeError, ValueError: as `fastkl.total_correlation`.

    Source: Chen et al. 2018, "Isolating Sources of Disentanglement in VAEs", arXiv:1802.04942, equation 4.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.randn(64, 2), torch.zeros(64, 2))
    >>> list(fastkl.objectives.beta_tc_vae(q, None, lambda z: z.sum(-1), dataset_size=1000).terms)[2:]
    ['mutual_information', 'total_correlation', 'dimension_wise_kl']
    """
    check(posterior, prior, log_likelihood)
    if not (prior is None or isinstance(prior, StandardNormal)):
        name = type(prior).__name__
        raise TypeError(f"prior must be None or StandardNormal, which factorises over dimensions, got {name}")
    alpha, beta, gamma = check_weight("alpha", alpha), check_weight("beta", beta), check_weight("gamma", gamma)
    z = draws(posterior, 1, eps)
    reconstruction = reconstruction_of(posterior, log_likelihood, z)[0]
    rows, mu, logvar = (tensor.flatten(0, -2) for tensor in (flat(posterior, z), *posterior.vectors()))
    parts = total_correlation(rows, mu, logvar, dataset_size, weights=weights, group=group)
    information, correlation, own = (part.mean() for part in parts)
    weighted = alpha * information + beta * correlation + gamma * own
    terms = {
        "reconstruction": reconstruction,
        "kl": parts.mutual_information + parts.total_correlation + parts.dimension_wise_kl,
        "mutual_information": parts.mutual_information,
        "total_correlation": parts.total_correlation,
        "dimension_wise_kl": parts.dimension_wise_kl,
    }
    return made_of(weighted - reconstruction.mean(), **terms)
