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
from fastkl.reference.discrete import gumbel_noise, gumbel_softmax, relaxed_one_hot
from fastkl.reference.divergences import (
    kl_multivariate_normal,
    kl_normal,
    kl_normal_per_dim,
    kl_terms,
    kl_terms_gradient,
)
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
from fastkl.reference.sampling import box_muller, normal_noise, philox, rsample_kl, rsample_normal

__all__ = [
    "SCALES",
    "SOFTPLUS_THRESHOLD",
    "SoftBounds",
    "bernoulli_log_prob",
    "bernoulli_terms_gradient",
    "bound",
    "bound_gradient",
    "box_muller",
    "compute_dtype",
    "gmm_joint_log_prob",
    "gmm_log_prob",
    "gmm_responsibilities",
    "gumbel_noise",
    "gumbel_softmax",
    "kl_gmm",
    "kl_gmm_bounds",
    "kl_multivariate_normal",
    "kl_normal",
    "kl_normal_per_dim",
    "kl_terms",
    "kl_terms_gradient",
    "normal_entropy",
    "normal_log_prob",
    "normal_noise",
    "normal_terms_gradient",
    "philox",
    "relaxed_one_hot",
    "rsample_kl",
    "rsample_normal",
    "sum_event",
    "to_logvar",
    "to_logvar_gradient",
]
