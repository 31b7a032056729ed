"""KL divergence between diagonal Gaussians of every latent dimension, averaged over the batch."""

from __future__ import annotations

import math

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import register
from fastkl.ops.normal._closed_form import write_normal_gradients
from fastkl.ops.normal._normal import DPRIOR, DQ, PRIOR, SETTINGS, NormalOp, Q, Settings
from fastkl.reference import SoftBounds


def share_of_rows(dkl: Tensor, mu: Tensor, event_ndim: int) -> Tensor:
    """The gradient of each row's share of the mean, which broadcasts with mu."""
    return dkl / max(1, math.prod(mu.shape[: mu.dim() - event_ndim]))


def _forward(mu, parameter, prior_mu, prior_logvar, *settings) -> Tensor:
    settings = Settings(*settings)
    named = {"event_ndim": settings.event_ndim, "scale": settings.scale, "bounds": arguments.as_bounds(*settings[2:])}
    return reference.kl_normal_per_dim(mu, parameter, prior_mu, prior_logvar, **named)


def _backward(
    dkl, mu, parameter, prior_mu, prior_logvar, dmu, dparameter, dprior_mu, dprior_logvar, *settings
) -> None:  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar), (dmu, dparameter, dprior_mu, dprior_logvar)
    settings = Settings(*settings)
    dvalue = share_of_rows(dkl, mu, settings.event_ndim)
    write_normal_gradients(inputs, outputs, settings, dvalue=dvalue)


def _fake_forward(mu, parameter, prior_mu, prior_logvar, event_ndim, *settings) -> Tensor:
    dtype = reference.compute_dtype(mu, parameter, prior_mu, prior_logvar)
    return mu.new_empty(mu.shape[mu.dim() - event_ndim :], dtype=dtype)


def _kernels():
    from fastkl.kernels.normal import kl_normal_per_dim

    return kl_normal_per_dim


def _loops():
    from fastkl.native import normal

    return normal


kl_normal_per_dim_fwd = register(
    f"kl_normal_per_dim_fwd({Q}, {PRIOR}, {SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().kl_normal_per_dim_fwd,
    terms=lambda mu, *_: mu.numel(),
)
kl_normal_per_dim_bwd = register(
    f"kl_normal_per_dim_bwd(Tensor dkl, {Q}, {PRIOR}, {DQ}, {DPRIOR}, {SETTINGS}) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().kl_normal_per_dim_bwd,
    terms=lambda dvalue, mu, *_: mu.numel(),
)
KL_NORMAL_PER_DIM = NormalOp(
    kl_normal_per_dim_fwd, kl_normal_per_dim_bwd, "kl_normal_per_dim_fwd", spread=share_of_rows
)


def kl_normal_per_dim(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """KL divergence from a diagonal Gaussian to N(0, I) or to another one, in nats, one batch mean per dimension.

    KL_d = 1/2 mean_n [exp(x_nd) - 1 - x_nd + (mu_nd - prior_mu_d)^2 / exp(prior_logvar_d)], x = logvar - prior_logvar

    It serves free bits (`torch.clamp(kl, min=0.25).sum()`) and the count of active units, without a temporary of the
    inputs' size.

    Args:
        mu: mean of q, [*batch, *event].
        logvar: ln sigma^2 of q, or another parameter, see `scale`; broadcasts with mu. One of the two may be a number.
        prior_mu, prior_logvar: mean and log-variance of p (or another parameter, see `prior_scale`). None is N(0, I);
            else numbers, or tensors of the full shape or shared by the batch ([*event], [1, *event]), whose gradient
            the kernel sums over the batch.
        event_ndim: number of last dimensions to keep, at least one; the mean is over all dimensions before them. None:
            every dimension after the first; a 1-D tensor is one datum.
        scale: the meaning of logvar: "logvar", "log_std", "std" or "softplus" (sigma = softplus of it).
        prior_scale: the meaning of prior_logvar, one of the same; it is converted before the kernel, in float32.
        bounds: (low, high) clamps the log-variance in the same pass, with gradient 0 outside;
            `fastkl.SoftBounds(low, high)` keeps the gradient there.

    Returns:
        [*event], float32 for float16, bfloat16 and float32 input, float64 if any input is; NaN for an empty batch, as
        in torch.mean. Gradients have each input's dtype; only the inputs are saved for the backward pass.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes do not broadcast, devices differ, event_ndim is out of range, scale is unknown, or bounds are
            in the wrong order.

    Source: Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow", arXiv:1606.04934,
    equation 16 (free bits).

    >>> import torch, fastkl
    >>> mu, logvar = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.zeros(2, 2)
    >>> fastkl.kl_normal_per_dim(mu, logvar)
    tensor([0.0000, 2.5000])
    """
    if event_ndim is not None and arguments.check_int("event_ndim", event_ndim, 0) == 0:
        raise ValueError("event_ndim must be at least 1, got 0: there would be no latent dimension")
    return KL_NORMAL_PER_DIM.value(mu, logvar, prior_mu, prior_logvar, event_ndim, scale, prior_scale, bounds)
