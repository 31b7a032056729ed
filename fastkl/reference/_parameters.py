"""Shared by all families: dtypes, sums, and parameterisations of the log-variance."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = ("logvar", "log_std", "std", "softplus")

# torch's softplus is the identity beyond a threshold; at its default of 20 the error shows in float64.
SOFTPLUS_THRESHOLD = 40.0


class SoftBounds(NamedTuple):
    """Bounds on the log-variance that let gradients through outside them.

    The value is clamped exactly as with a plain tuple `(low, high)`. The gradient passes through the clamp
    (straight-through; Bengio et al. 2013, arXiv:1308.3432), with its value at the bound. So the loss can pull back a
    log-variance that has left the interval, which would otherwise stay there.

    >>> import torch, fastkl
    >>> logvar = torch.tensor([[50.0]], requires_grad=True)
    >>> fastkl.kl_normal(torch.zeros(1, 1), logvar, bounds=(-30, 20)).backward()
    >>> logvar.grad.item()
    0.0
    >>> logvar.grad = None
    >>> fastkl.kl_normal(torch.zeros(1, 1), logvar, bounds=fastkl.SoftBounds(-30, 20)).backward()
    >>> logvar.grad.item() > 1e8
    True
    """

    low: float
    high: float


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which an op computes and accumulates: float64 if any input is, else float32."""
    for tensor in tensors:  # a generator would cost more than the questions
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def to_logvar(parameter: Tensor, scale: str = "logvar") -> Tensor:
    """The log-variance of `parameter`, which is what `scale` says.

    Below -15, softplus(p) equals exp(p) (1 - exp(p) / 2) up to rounding. Its logarithm is then computed in closed form,
    so that it does not underflow.
    """
    if scale == "logvar":
        return parameter
    if scale == "log_std":
        return 2 * parameter
    if scale == "std":
        return 2 * _log(parameter)
    tail = parameter < -15
    value = F.softplus(parameter.masked_fill(tail, 0.0), threshold=SOFTPLUS_THRESHOLD)
    return 2 * torch.where(tail, parameter - 0.5 * parameter.clamp(max=-15).exp(), _log(value))


def _log(std: Tensor) -> Tensor:
    """ln whose derivative stays above 0 at infinity, because the incoming gradient is infinite there."""
    return torch.where(std == torch.inf, std * torch.finfo(std.dtype).tiny, std.log())


def to_parameter_gradient(dlogvar: Tensor, parameter: Tensor, scale: str) -> Tensor:
    """The gradient in the parameter, from that in the log-variance. Divides by sigma, because 1 / sigma is subnormal
    for large sigma. An infinite sigma counts as the largest number, because dlogvar is infinite there too."""
    if scale == "logvar":
        return dlogvar
    if scale == "log_std":
        return 2 * dlogvar
    most = torch.finfo(parameter.dtype).max
    if scale == "std":
        nothing = (dlogvar == 0) & (parameter == 0)
        return 2 * (dlogvar / torch.where(nothing, 1.0, parameter.clamp(max=most)))
    tail = parameter < -15
    body = parameter.masked_fill(tail, 0.0)
    sigma = F.softplus(body, threshold=SOFTPLUS_THRESHOLD).clamp(max=most)
    return torch.where(
        tail, dlogvar * (2 - parameter.clamp(max=-15).exp()), 2 * (dlogvar * torch.sigmoid(body) / sigma)
    )


def bound(logvar: Tensor, bounds: SoftBounds | tuple[float, float] | None) -> Tensor:
    """The clamped log-variance; with SoftBounds the clamp has the gradient of the identity."""
    if bounds is None:
        return logvar
    clamped = logvar.clamp(bounds[0], bounds[1])
    if isinstance(bounds, SoftBounds):
        live = logvar.nan_to_num()  # inf - inf would not be 0
        return clamped.detach() + (live - live.detach())
    return clamped


def bound_gradient(dlogvar: Tensor, logvar: Tensor, bounds: SoftBounds | tuple[float, float] | None) -> Tensor:
    """The gradient in the log-variance before the clamp; it passes through NaN entries."""
    if bounds is None or isinstance(bounds, SoftBounds):
        return dlogvar
    return dlogvar.masked_fill((logvar < bounds[0]) | (logvar > bounds[1]), 0.0)


def exp_minus_one_minus(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, accurate near 0 and infinite at infinity.

    Near 0 the plain formula loses the digits of x^2 / 2. With x = s + d, s within [-1, 1], the value is
    r + exp(s) (exp(d) - 1) - d, where r = exp(s) - 1 - s is the series s^2 / 2 (1 + s / 3 (1 + s / 4 (...))).
    """
    s = x.clamp(-1.0, 1.0)
    d = x - s
    one = x.new_ones(())
    r = one
    for i in range(19 if x.dtype == torch.float64 else 11, 2, -1):
        r = torch.addcmul(one, s, r, value=1 / i)
    r = 0.5 * s * s * r
    return r + (1 + s + r) * (d.exp() - 1) - d.clamp(max=1000.0)


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """ln(a / b), from the quotient, which is accurate when the two are close, or from the two logarithms if the
    quotient is not a normal number."""
    ratio = a / b
    finite = torch.finfo(ratio.dtype)
    apart = ((ratio < finite.tiny) | (ratio > finite.max)) & (a > 0) & (b > 0)
    close = torch.log(torch.where(apart, 1.0, ratio))
    return torch.where(apart, torch.where(apart, a, 1.0).log() - torch.where(apart, b, 1.0).log(), close)


def standardise(difference: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """(difference / sigma, sqrt(1 / sigma)), sigma = exp(logvar / 2).

    Multiply by this root twice instead of dividing by sigma. It overflows only at twice the log-variance at which
    1 / sigma does, and it is kept finite, so that a difference of 0 gives 0 however small sigma is.
    """
    root = torch.exp((-0.25 * logvar).clamp(max=709.0 if logvar.dtype == torch.float64 else 88.0))
    return difference * root * root, root


def weighted(weight: Tensor, values: Tensor) -> Tensor:
    """weight * values, but 0 if the weight is 0, even if the value has overflowed. Differentiable in both."""
    most = torch.finfo(values.dtype).max
    return weight * torch.where(weight == 0, values.clamp(-most, most), values)


def sum_event(values: Tensor, event_ndim: int | None) -> Tensor:
    """The sum over the last `event_ndim` dimensions. None means all after the first, or the only one."""
    if event_ndim is None:
        event_ndim = max(1, values.dim() - 1)
    return values.flatten(values.dim() - event_ndim).sum(-1) if event_ndim else values
