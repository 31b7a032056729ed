"""Squared 2-Wasserstein distance of diagonal Gaussians, by the kernels of kl_normal with other terms."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import exp, exp_minus_one_minus_series, expm1
from fastkl.kernels.normal import kl_normal


@triton.jit
def sigma_difference(logvar, prior_logvar):
    """(sigma, prior_sigma, sigma - prior_sigma), the difference without cancellation."""
    x, sigma, prior_sigma = 0.5 * (logvar - prior_logvar), exp(logvar, 0.5), exp(prior_logvar, 0.5)
    close = prior_sigma * (x + exp_minus_one_minus_series(x))
    return sigma, prior_sigma, tl.where(tl.abs(x) < 0.5, close, sigma - prior_sigma)


@triton.jit
def wasserstein2_terms(mu, logvar, prior_mu, prior_logvar):
    """The squared 2-Wasserstein distance of N(mu, exp(logvar)) and N(prior_mu, exp(prior_logvar)). A prior of None is
    N(0, 1)."""
    if prior_mu is None:
        difference = expm1(0.5 * logvar, exp(logvar, 0.5))
        return mu * mu + difference * difference
    else:
        _, _, difference = sigma_difference(logvar, prior_logvar)
        return (mu - prior_mu) * (mu - prior_mu) + difference * difference


@triton.jit
def wasserstein2_terms_gradient(mu, logvar, prior_mu, prior_logvar):
    """Gradients in mu, logvar and prior_logvar (0 without a prior). The gradient in prior_mu is minus that in mu."""
    if prior_mu is None:
        sigma = exp(logvar, 0.5)
        return 2.0 * mu, expm1(0.5 * logvar, sigma) * sigma, 0.0
    else:
        sigma, prior_sigma, difference = sigma_difference(logvar, prior_logvar)
        return 2.0 * (mu - prior_mu), difference * sigma, -difference * prior_sigma


def of_points(scale: str) -> str:
    """The scale, with a gradient for a standard deviation of 0: the distance is finite there."""
    return "std_or_0" if scale == "std" else scale


def fwd(
    mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    event_ndim: int, scale: str, low: float, high: float, live: bool,
) -> Tensor:  # fmt: skip
    inputs = (mu, parameter, prior_mu, prior_logvar)
    return kl_normal.fwd(*inputs, event_ndim, of_points(scale), low, high, live, wasserstein2_terms)


def bwd(
    dkl: Tensor, mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    dmu: Tensor, dparameter: Tensor, dprior_mu: Tensor | None, dprior_logvar: Tensor | None,
    event_ndim: int, scale: str, low: float, high: float, live: bool,
) -> None:  # fmt: skip
    inputs, outputs = (dkl, mu, parameter, prior_mu, prior_logvar), (dmu, dparameter, dprior_mu, dprior_logvar)
    kl_normal.bwd(*inputs, *outputs, event_ndim, of_points(scale), low, high, live, wasserstein2_terms_gradient)
