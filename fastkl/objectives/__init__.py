"""Losses of a training step, composed of ops, with one signature: exchanging them does not change the loop.

    loss, terms = objectives.elbo(posterior, prior, log_likelihood)

Every objective takes the posterior (a fastkl.DiagonalNormal with a batch dimension), the prior (one of fastkl.priors or
None for N(0, I)) and the reconstruction log-likelihood, a function of z [*samples, *batch, *event] that returns
ln p(x | z) [*samples, *batch]. It returns a `Loss`: the scalar to minimise and a small record of its terms.
"""

from fastkl.objectives._loss import LogLikelihood, Loss
from fastkl.objectives.adversarial import Discriminator, aae
from fastkl.objectives.clusters import vade
from fastkl.objectives.decomposition import beta_tc_vae
from fastkl.objectives.elbo import beta_vae, elbo, sample_kl
from fastkl.objectives.importance import ciwae, iwae, miwae, piwae
from fastkl.objectives.matching import info_vae, wae_mmd
from fastkl.objectives.transport import sinkhorn_ae, swae

__all__ = [
    "Discriminator",
    "LogLikelihood",
    "Loss",
    "aae",
    "beta_tc_vae",
    "beta_vae",
    "ciwae",
    "elbo",
    "info_vae",
    "iwae",
    "miwae",
    "piwae",
    "sample_kl",
    "sinkhorn_ae",
    "swae",
    "vade",
    "wae_mmd",
]
