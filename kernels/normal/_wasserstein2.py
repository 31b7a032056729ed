"""Device functions of the squared 2-Wasserstein distance of Gaussians, summed by kl_normal's kernels."""

import triton
import triton.language as tl

from fastkl.kernels._device import exp, exp_minus_one_minus_series, expm1


@triton.jit
def above_zero(parameter, SCALE: tl.constexpr):
    """The parameter, with 1e-30 for a standard deviation of 0 (a point mass), whose logarithm has no gradient."""
    if SCALE == "std":
        return tl.where(parameter == 0.0, 1e-30, parameter)
    return parameter


@triton.jit
def _sigma_difference(logvar, prior_logvar):
    """(sigma, prior_sigma, sigma - prior_sigma), the difference without cancellation."""
    x, sigma, prior_sigma = 0.5 * (logvar - prior_logvar), exp(logvar, 0.5), exp(prior_logvar, 0.5)
    close = prior_sigma * (x + exp_minus_one_minus_series(x))
    return sigma, prior_sigma, tl.where(tl.abs(x) < 0.5, close, sigma - prior_sigma)


@triton.jit
def wasserstein2_terms(mu, logvar):
    """The squared 2-Wasserstein distance from N(mu, exp(logvar)) to N(0, 1)."""
    difference = expm1(0.5 * logvar, exp(logvar, 0.5))
    return mu * mu + difference * difference


@triton.jit
def wasserstein2_terms_gradient(mu, logvar):
    sigma = exp(logvar, 0.5)
    return 2.0 * mu, expm1(0.5 * logvar, sigma) * sigma


@triton.jit
def wasserstein2_terms_prior(mu, logvar, prior_mu, prior_logvar):
    _, _, difference = _sigma_difference(logvar, prior_logvar)
    return (mu - prior_mu) * (mu - prior_mu) + difference * difference


@triton.jit
def wasserstein2_terms_prior_gradient(mu, logvar, prior_mu, prior_logvar):
    """Gradients in mu, logvar and prior_logvar. The gradient in prior_mu is minus that in mu."""
    sigma, prior_sigma, difference = _sigma_difference(logvar, prior_logvar)
    return 2.0 * (mu - prior_mu), difference * sigma, -difference * prior_sigma
