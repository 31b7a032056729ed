"""Priors of a variational autoencoder as modules, trained with it instead of a fixed N(0, I).

Every prior has log_prob(z), sample(n) and kl(q), in nats, one value per datum. The latent is one vector of `dim`
numbers; a posterior whose event has more dimensions (q.event_ndim > 1) is flattened.
"""

from fastkl.priors._fit import FitRecord
from fastkl.priors._prior import Prior
from fastkl.priors.flow import FlowPrior
from fastkl.priors.gaussian import LearnedNormal, StandardNormal
from fastkl.priors.gaussian_mixture import GaussianMixture
from fastkl.priors.mixture import Mixture, MixturePrior, Usage
from fastkl.priors.per_position import PerPosition
from fastkl.priors.vamp import VampPrior

__all__ = [
    "FitRecord",
    "FlowPrior",
    "GaussianMixture",
    "LearnedNormal",
    "Mixture",
    "MixturePrior",
    "PerPosition",
    "Prior",
    "StandardNormal",
    "Usage",
    "VampPrior",
]
