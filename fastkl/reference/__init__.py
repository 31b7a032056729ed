"""Every op as plain, differentiable PyTorch: the definition, one page per family.

Slow and clear. The kernels are tested against these functions in float64, and the arguments mean the same there.
Notation: q = N(mu, diag sigma^2), logvar = ln sigma^2, p the prior; everything is in nats.
"""

from fastkl.reference._parameters import (
    SCALES,
    SOFTPLUS_THRESHOLD,
    SoftBounds,
    bound,
    bound_gradient,
    compute_dtype,
    sum_event,
    to_logvar,
    to_logvar_gradient,
)
from fastkl.reference.decomposition import Decomposition, sample_weights, total_correlation
from fastkl.reference.discrepancies import (
    MMD_ESTIMATORS,
    MMD_KERNELS,
    MMD_SCALES,
    mmd,
    mmd_kernel,
    mmd_kernel_slope,
    mmd_normal,
    mmd_normal_terms,
    rbf_of_normals,
)
from fastkl.reference.discrete import gumbel_noise, gumbel_softmax, relaxed_one_hot
from fastkl.reference.divergences import (
    kl_multivariate_normal,
    kl_normal,
    kl_normal_per_dim,
    kl_terms,
    kl_terms_gradient,
)
from fastkl.reference.importance import effective_sample_size, importance_weights, iwae, weight_entropy
from fastkl.reference.likelihoods import (
    bernoulli_log_prob,
    bernoulli_terms_gradient,
    normal_log_prob,
    normal_terms_gradient,
)
from fastkl.reference.mixtures import (
    gmm_joint_log_prob,
    gmm_log_prob,
    gmm_responsibilities,
    kl_gmm,
    kl_gmm_bounds,
    normal_entropy,
)
from fastkl.reference.sampling import Stream, box_muller, normal_noise, philox, rsample_kl, rsample_normal
from fastkl.reference.transport import (
    above_zero,
    directions,
    projections,
    quantile_segments,
    sinkhorn_divergence,
    sinkhorn_schedule,
    sliced_wasserstein,
    wasserstein2_multivariate_normal,
    wasserstein2_normal,
    wasserstein2_terms,
    wasserstein2_terms_gradient,
)

__all__ = [
    "MMD_ESTIMATORS",
    "MMD_KERNELS",
    "MMD_SCALES",
    "SCALES",
    "SOFTPLUS_THRESHOLD",
    "Decomposition",
    "SoftBounds",
    "Stream",
    "above_zero",
    "bernoulli_log_prob",
    "bernoulli_terms_gradient",
    "bound",
    "bound_gradient",
    "box_muller",
    "compute_dtype",
    "directions",
    "effective_sample_size",
    "gmm_joint_log_prob",
    "gmm_log_prob",
    "gmm_responsibilities",
    "gumbel_noise",
    "gumbel_softmax",
    "importance_weights",
    "iwae",
    "kl_gmm",
    "kl_gmm_bounds",
    "kl_multivariate_normal",
    "kl_normal",
    "kl_normal_per_dim",
    "kl_terms",
    "kl_terms_gradient",
    "mmd",
    "mmd_kernel",
    "mmd_kernel_slope",
    "mmd_normal",
    "mmd_normal_terms",
    "normal_entropy",
    "normal_log_prob",
    "normal_noise",
    "normal_terms_gradient",
    "philox",
    "projections",
    "quantile_segments",
    "rbf_of_normals",
    "relaxed_one_hot",
    "rsample_kl",
    "rsample_normal",
    "sample_weights",
    "sinkhorn_divergence",
    "sinkhorn_schedule",
    "sliced_wasserstein",
    "sum_event",
    "to_logvar",
    "to_logvar_gradient",
    "total_correlation",
    "wasserstein2_multivariate_normal",
    "wasserstein2_normal",
    "wasserstein2_terms",
    "wasserstein2_terms_gradient",
    "weight_entropy",
]
