"""fastkl: drop-in losses for variational autoencoders."""

from fastkl import (
    _kl_divergence,  # noqa: F401 (registers DiagonalNormal with torch.distributions.kl_divergence)
    monitors,
    objectives,
    priors,
    remedies,
    schedules,
)
from fastkl.distributions import DiagonalNormal
from fastkl.ops.categorical.gumbel_softmax import gumbel_softmax
from fastkl.ops.importance.iwae import effective_sample_size, iwae, weight_entropy
from fastkl.ops.likelihood.bernoulli_log_prob import bernoulli_log_prob
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob
from fastkl.ops.mixture.gmm_moments import GMMMoments, gmm_moments
from fastkl.ops.mixture.gmm_responsibilities import gmm_responsibilities
from fastkl.ops.mixture.kl_gmm import kl_gmm
from fastkl.ops.mixture.kl_gmm_bounds import kl_gmm_bounds
from fastkl.ops.mixture.rsample_gmm import rsample_gmm, sample_gmm
from fastkl.ops.multivariate.kl_multivariate_normal import kl_multivariate_normal
from fastkl.ops.multivariate.wasserstein2_multivariate_normal import wasserstein2_multivariate_normal
from fastkl.ops.normal.kl_normal import kl_normal
from fastkl.ops.normal.kl_normal_per_dim import kl_normal_per_dim
from fastkl.ops.normal.rsample_kl import rsample_kl
from fastkl.ops.normal.rsample_normal import rsample_normal
from fastkl.ops.normal.wasserstein2_normal import wasserstein2_normal
from fastkl.ops.pairs.mmd import mmd
from fastkl.ops.pairs.mmd_normal import mmd_normal
from fastkl.ops.pairs.total_correlation import total_correlation
from fastkl.ops.transport.sinkhorn_divergence import sinkhorn_divergence
from fastkl.ops.transport.sliced_wasserstein import sliced_wasserstein
from fastkl.reference import Decomposition, SoftBounds

__version__ = "0.2.0"

__all__ = [
    "Decomposition",
    "DiagonalNormal",
    "GMMMoments",
    "SoftBounds",
    "bernoulli_log_prob",
    "effective_sample_size",
    "gmm_log_prob",
    "gmm_moments",
    "gmm_responsibilities",
    "gumbel_softmax",
    "iwae",
    "kl_gmm",
    "kl_gmm_bounds",
    "kl_multivariate_normal",
    "kl_normal",
    "kl_normal_per_dim",
    "mmd",
    "mmd_normal",
    "monitors",
    "normal_log_prob",
    "objectives",
    "priors",
    "remedies",
    "rsample_gmm",
    "rsample_kl",
    "rsample_normal",
    "sample_gmm",
    "schedules",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "total_correlation",
    "wasserstein2_multivariate_normal",
    "wasserstein2_normal",
    "weight_entropy",
]
