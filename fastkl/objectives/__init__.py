"""What a training step minimises, composed of ops: swap one for another and the loop stays as it is.

    loss, terms = objectives.elbo(posterior, prior, log_likelihood)

Every objective takes the posterior (a fastkl.DiagonalNormal with a batch dimension), the prior (one of fastkl.priors or
None for N(0, I)) and the reconstruction log-likelihood, a function of z [*samples, *batch, *event] that returns
ln p(x | z) [*samples, *batch]. It returns a `Loss`: the scalar to minimise and a small record of its terms.
"""

from fastkl.objectives._loss import Loss

__all__ = ["Loss"]
