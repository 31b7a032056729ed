"""KL divergence between diagonal Gaussians, one value per sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply
from fastkl.ops._register import register
from fastkl.ops.normal._closed_form import by_rows, write_normal_gradients
from fastkl.ops.normal._normal import (
    DPRIOR,
    DQ,
    PRIOR,
    SETTINGS,
    NormalFunction,
    NormalOp,
    Q,
    Settings,
    fake_value,
    of_rows,
)
from fastkl.reference import SoftBounds


def _forward(mu, parameter, prior_mu, prior_logvar, *settings) -> Tensor:
    return by_rows(reference.kl_normal, (mu, parameter, prior_mu, prior_logvar), Settings(*settings))


def _backward(
    dkl, mu, parameter, prior_mu, prior_logvar, dmu, dparameter, dprior_mu, dprior_logvar, *settings
) -> None:  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar), (dmu, dparameter, dprior_mu, dprior_logvar)
    settings = Settings(*settings)
    dvalue = of_rows(dkl, mu, settings.event_ndim)
    write_normal_gradients(inputs, outputs, settings, dvalue=dvalue)


def _kernels():
    from fastkl.kernels.normal import kl_normal

    return kl_normal


def _loops():
    from fastkl.native import normal

    return normal


kl_normal_fwd = register(
    f"kl_normal_fwd({Q}, {PRIOR}, {SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=fake_value,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().kl_normal_fwd,
    terms=lambda mu, *_: mu.numel(),
)
kl_normal_bwd = register(
    f"kl_normal_bwd(Tensor dkl, {Q}, {PRIOR}, {DQ}, {DPRIOR}, {SETTINGS}) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().kl_normal_bwd,
    terms=lambda dvalue, mu, *_: mu.numel(),
)
KL_NORMAL = NormalOp(kl_normal_fwd, kl_normal_bwd, "kl_normal_fwd")


def kl_normal_packed(
    head: Tensor, dim: int, prior_mu: Any = None, prior_logvar: Any = None, *,
    event_ndim: int, scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """kl_normal(*head.chunk(2, dim), ...) whose gradient is one packed tensor, written by the kernel itself."""
    prior_mu, prior_logvar = arguments.as_tensors(head, prior_mu, prior_logvar)
    arguments.check_tensors(head=head, prior_mu=prior_mu, prior_logvar=prior_logvar)
    dim = arguments.check_packed(head, dim)
    half = head.chunk(2, dim)[0]
    event_ndim = arguments.event_ndim_of_datum(event_ndim, half.shape, "the posterior's shape")
    arguments.check_prior_fits(half.shape, prior_mu=prior_mu, prior_logvar=prior_logvar)
    prior = arguments.expand_prior(prior_mu, prior_logvar, head, half.shape, event_ndim)
    event_ndim, head, *tensors = arguments.as_events(event_ndim, head, *prior)
    settings = Settings(event_ndim, arguments.check_scale(scale), *arguments.check_bounds(bounds))
    return apply(NormalFunction, KL_NORMAL, dim, settings, head, None, *tensors, None, None)


def kl_normal(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """KL divergence from a diagonal Gaussian to N(0, I) or to another one, in nats, one value per sample.

    KL(q || p) = 1/2 sum_d [exp(x_d) - 1 - x_d + (mu_d - prior_mu_d)^2 / exp(prior_logvar_d)], x = logvar - prior_logvar

    Args:
        mu: mean of q, [*batch, *event].
        logvar: ln sigma^2 of q, or another parameter, see `scale`; broadcasts with mu. One of the two may be a number.
        prior_mu, prior_logvar: mean and log-variance of p (or another parameter, see `prior_scale`). None is N(0, I);
            else numbers, or tensors of the full shape or shared by the batch ([*event], [1, *event]), whose gradient
            the kernel sums over the batch.
        event_ndim: number of last dimensions to sum. None: every dimension after the first, which gives one value per
            datum for [N, D] and [N, C, H, W]; a 1-D tensor is one datum. 1 gives one value per token of [B, T, D], 0
            one per element.
        scale: the meaning of logvar: "logvar", "log_std", "std" or "softplus" (sigma = softplus of it).
        prior_scale: the meaning of prior_logvar, one of the same; it is converted before the kernel, in float32.
        bounds: (low, high) clamps the log-variance in the same pass, with gradient 0 outside;
            `fastkl.SoftBounds(low, high)` keeps the gradient there.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients have each input's
        dtype; only the inputs are saved for the backward pass.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes do not broadcast, devices differ, event_ndim is out of range, scale is unknown, or bounds are
            in the wrong order.

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114, appendix B.

    >>> import torch, fastkl
    >>> mu, logvar = torch.zeros(2, 3), torch.full((2, 3), 1e-4)
    >>> [f"{kl:.1e}" for kl in fastkl.kl_normal(mu, logvar)]
    ['7.5e-09', '7.5e-09']
    """
    return KL_NORMAL.value(mu, logvar, prior_mu, prior_logvar, event_ndim, scale, prior_scale, bounds)
