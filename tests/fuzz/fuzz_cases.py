"""The fuzz cases by name: every op and everything composed of ops."""

from __future__ import annotations

import math

import fuzz_objectives as objectives
from fuzz_monitors import monitor, remedy
from fuzz_posteriors import posterior
from fuzz_prior_calls import flow, kl_relaxed, per_position, prior_kl, prior_log_prob, prior_rsample
from fuzz_transport import adversarial, transport

import fastkl

import fuzz_oracle as oracle
from fuzz_batches import (
    importance,
    mmd,
    mmd_normal,
    multivariate,
    sliced_wasserstein,
    total_correlation,
)
from fuzz_mixtures import (
    gmm,
    gmm_moments,
    gmm_precision,
    kl_gmm,
    kl_gmm_bounds,
    rsample_gmm,
    sample_gmm,
)
from fuzz_normal import (
    bernoulli_log_prob,
    gumbel_softmax,
    normal_log_prob,
    rsample_kl,
    rsample_normal,
    value_of,
)

OPS = {
    "kl_normal": value_of(fastkl.kl_normal, oracle.kl_elements),
    "kl_normal_per_dim": value_of(fastkl.kl_normal_per_dim, oracle.kl_elements),
    "wasserstein2_normal": value_of(fastkl.wasserstein2_normal, oracle.wasserstein2_elements),
    "rsample_normal": rsample_normal,
    "rsample_kl": rsample_kl,
    "posterior": posterior,
    "normal_log_prob": normal_log_prob,
    "bernoulli_log_prob": bernoulli_log_prob,
    "gumbel_softmax": gumbel_softmax,
    "gmm_log_prob": gmm(fastkl.gmm_log_prob, lambda joint: joint.logsumexp(-1)),
    "gmm_responsibilities": gmm(fastkl.gmm_responsibilities, lambda joint: joint - joint.logsumexp(-1, keepdim=True)),
    "gmm_moments": gmm_moments,
    "kl_gmm": kl_gmm,
    "kl_gmm_bounds": kl_gmm_bounds,
    "gmm_precision": gmm_precision,
    "sample_gmm": sample_gmm,
    "rsample_gmm": rsample_gmm,
    "iwae": importance(fastkl.iwae, lambda log_w, dim: log_w.logsumexp(dim) - math.log(log_w.shape[dim])),
    "effective_sample_size": importance(fastkl.effective_sample_size, oracle.effective_sample_size),
    "weight_entropy": importance(fastkl.weight_entropy, oracle.weight_entropy),
    "total_correlation": total_correlation,
    "mmd": mmd,
    "mmd_normal": mmd_normal,
    "sliced_wasserstein": sliced_wasserstein,
    "kl_multivariate_normal": multivariate(fastkl.kl_multivariate_normal, oracle.kl_multivariate),
    "wasserstein2_multivariate_normal": multivariate(
        fastkl.wasserstein2_multivariate_normal, oracle.wasserstein2_multivariate
    ),
}

# Priors, objectives, monitors and remedies.
COMPOSED = {
    "prior_log_prob": prior_log_prob,
    "prior_kl": prior_kl,
    "prior_rsample": prior_rsample,
    "per_position": per_position,
    "flow": flow,
    "kl_relaxed": kl_relaxed,
    "monitor": monitor,
    "remedy": remedy,
    "elbo": objectives.elbo,
    "importance": objectives.importance,
    "clusters": objectives.clusters,
    "matching": objectives.matching,
    "transport": transport,
    "adversarial": adversarial,
}

CASES = OPS | COMPOSED
