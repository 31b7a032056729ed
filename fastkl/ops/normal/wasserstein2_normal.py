"""Squared 2-Wasserstein distance between diagonal Gaussians, one value per sample."""

from __future__ import annotations

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import register
from fastkl.ops.normal._closed_form import by_rows, write_normal_gradients
from fastkl.ops.normal._normal import (
    DPRIOR,
    DQ,
    PRIOR,
    SETTINGS,
    NormalOp,
    Q,
    Settings,
    fake_value,
    of_rows,
)
from fastkl.reference import SoftBounds


def _forward(mu, parameter, prior_mu, prior_logvar, *settings) -> Tensor:
    return by_rows(reference.wasserstein2_normal, (mu, parameter, prior_mu, prior_logvar), Settings(*settings))


def _backward(
    ddistance, mu, parameter, prior_mu, prior_logvar, dmu, dparameter, dprior_mu, dprior_logvar, *settings
) -> None:  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar), (dmu, dparameter, dprior_mu, dprior_logvar)
    settings = Settings(*settings)
    dvalue, terms_gradient = of_rows(ddistance, mu, settings.event_ndim), reference.wasserstein2_terms_gradient
    write_normal_gradients(inputs, outputs, settings, dvalue=dvalue, terms_gradient=terms_gradient)


def _kernels():
    from fastkl.kernels.normal import wasserstein2_normal

    return wasserstein2_normal


def _loops():
    from fastkl.native import normal

    return normal


wasserstein2_normal_fwd = register(
    f"wasserstein2_normal_fwd({Q}, {PRIOR}, {SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=fake_value,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().wasserstein2_normal_fwd,
    terms=lambda mu, *_: mu.numel(),
)
wasserstein2_normal_bwd = register(
    f"wasserstein2_normal_bwd(Tensor ddistance, {Q}, {PRIOR}, {DQ}, {DPRIOR}, {SETTINGS}) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().wasserstein2_normal_bwd,
    terms=lambda dvalue, mu, *_: mu.numel(),
)
WASSERSTEIN2_NORMAL = NormalOp(
    wasserstein2_normal_fwd, wasserstein2_normal_bwd, "wasserstein2_normal_fwd",
    terms_gradient=reference.wasserstein2_terms_gradient,
)  # fmt: skip


def wasserstein2_normal(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """Squared 2-Wasserstein distance from a diagonal Gaussian to N(0, I) or to another one, one value per sample.

    W_2^2(q, p) = sum_d [(mu_d - prior_mu_d)^2 + (sigma_d - prior_sigma_d)^2], sigma = exp(logvar / 2)

    Unlike the KL it stays finite as sigma -> 0. Near sigma = prior_sigma the difference comes from expm1, without
    cancellation. For full covariances use `fastkl.wasserstein2_multivariate_normal`.

    Args:
        mu, logvar, prior_mu, prior_logvar, event_ndim, scale, prior_scale, bounds: as for `fastkl.kl_normal`.

    Returns:
        [*batch], in squared units of z, float32 for float16, bfloat16 and float32 input, float64 if any input is.
        Gradients have each input's dtype; only the inputs are saved for the backward pass.

    Raises:
        TypeError, ValueError: as kl_normal.

    Source: Dowson and Landau 1982, "The Frechet distance between multivariate normal distributions", equation 4, for
    covariances that commute.

    >>> import torch, fastkl
    >>> mu, logvar = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2e-4, 2e-4]])
    >>> [f"{distance:.2g}" for distance in fastkl.wasserstein2_normal(mu, logvar)]
    ['9', '2e-08']
    """
    if prior_scale == "std" and prior_logvar is not None:  # 0 for a point prior
        (std,) = arguments.as_tensors(mu if isinstance(mu, Tensor) else logvar, prior_logvar)
        arguments.check_tensors(prior_logvar=std)
        prior_logvar = reference.above_zero(std.to(reference.compute_dtype(std)), prior_scale)
    return WASSERSTEIN2_NORMAL.value(mu, logvar, prior_mu, prior_logvar, event_ndim, scale, prior_scale, bounds)
