"""Log-likelihood of independent normal variables, one value per sample."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, event_ndim_of_common_call
from fastkl.ops._register import register
from fastkl.ops._scales import as_logvar
from fastkl.ops.likelihood._likelihood import Likelihood, LikelihoodFunction, write

# x and mean are of the full shape [*batch, *event]. logvar is too, or it is [*batch, 1, ..., 1] (one value per row), or
# [*event] (shared by the batch); its gradient is then summed inside the kernel.


def _fit_logvar(logvar: Tensor, shape: torch.Size, event_ndim: int) -> Tensor:
    batch_ndim = len(shape) - event_ndim
    own = logvar.shape[max(0, logvar.dim() - event_ndim) :]
    if math.prod(own) == 1:
        return arguments.expand(logvar, (*shape[:batch_ndim], *[1] * event_ndim))
    if batch_ndim and arguments.is_shared(logvar, event_ndim):
        return arguments.expand(arguments.without_leading(logvar, logvar.dim() - len(own)), shape[batch_ndim:])
    return arguments.expand(logvar, shape)


def _forward(x, mean, logvar, event_ndim) -> Tensor:
    density = functools.partial(reference.normal_log_prob, event_ndim=event_ndim)
    return arguments.by_rows(density, x, event_ndim, [x, mean, logvar])


def _gradients(dlog_prob, x, mean, logvar, event_ndim, wanted) -> list[Tensor | None]:
    """Closed form in differentiable torch ops, None for each of (x, mean, logvar) where it is not wanted."""
    dtype = reference.compute_dtype(x, mean, logvar)
    dlog_prob = dlog_prob.to(dtype).reshape(*dlog_prob.shape, *[1] * event_ndim)
    dmean, dlogvar = reference.normal_terms_gradient(dlog_prob, x.to(dtype), mean.to(dtype), logvar.to(dtype))
    gradients = zip((-dmean, dmean, dlogvar), (x, mean, logvar), wanted)
    return [gradient.sum_to_size(t.shape).to(t.dtype) if want else None for gradient, t, want in gradients]


def _backward(dlog_prob, x, mean, logvar, dx, dmean, dlogvar, event_ndim) -> None:
    outputs = (dx, dmean, dlogvar)
    wanted = [output is not None for output in outputs]
    write(outputs, _gradients(dlog_prob, x, mean, logvar, event_ndim, wanted))


def _fake_forward(x, mean, logvar, event_ndim) -> Tensor:
    return x.new_empty(x.shape[: x.dim() - event_ndim], dtype=reference.compute_dtype(x, mean, logvar))


def _kernels():
    from fastkl.kernels.likelihood import normal_log_prob

    return normal_log_prob


def _loops():
    from fastkl.native import likelihood

    return likelihood


normal_log_prob_fwd = register(
    "normal_log_prob_fwd(Tensor x, Tensor mean, Tensor logvar, int event_ndim) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().normal_log_prob_fwd,
    terms=lambda x, *_: x.numel(),
)
normal_log_prob_bwd = register(
    "normal_log_prob_bwd(Tensor dlog_prob, Tensor x, Tensor mean, Tensor logvar, Tensor(a!)? dx, Tensor(b!)? dmean, "
    "Tensor(c!)? dlogvar, int event_ndim) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().bwd,
    native=lambda: _loops().normal_log_prob_bwd,
    terms=lambda dlog_prob, x, *_: x.numel(),
)
NORMAL = Likelihood(normal_log_prob_fwd, normal_log_prob_bwd, "normal_log_prob_fwd", _gradients, _fit_logvar)


def normal_log_prob(
    x: Tensor, mean: Tensor | float, logvar: Tensor | float, *, event_ndim: int | None = None, scale: str = "logvar"
) -> Tensor:
    """Log-likelihood of `x` under independent normal variables, in nats, one value per sample.

    ln p(x) = -1/2 sum_d [ln 2 pi + logvar_d + (x_d - mean_d)^2 / exp(logvar_d)]

    Args:
        x, mean: data and its reconstruction, [*batch, *event]; they broadcast (for importance samples [L, N, *event] x
            is not copied), and their dtypes may differ.
        logvar: ln sigma^2, broadcasts with them; it and the mean may be numbers. For one value per sample
            ([N, 1, ..., 1]), a single value (0-d: the learned variance of the sigma-VAE), or one per dimension of the
            event, shared by the batch, the kernel sums its gradient.
        event_ndim: number of last dimensions to sum. None: every dimension after the first; a 1-D tensor is one datum.
            0: no sum, one value per element. With a leading dimension of importance samples it must be given.
        scale: the meaning of logvar: "logvar", "log_std", "std" or "softplus" (sigma = softplus of it); it is converted
            before the kernel, in float32.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients have each input's
        dtype; only requested ones are computed. Only the inputs are saved for the backward pass.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes do not broadcast, devices differ, event_ndim is out of range, or scale is unknown.

    Source: Rybkin, Daniilidis and Levine 2021, "Simple and Effective VAE Training with Calibrated Decoders",
    arXiv:2006.13202, equation 2.

    >>> import torch, fastkl
    >>> fastkl.normal_log_prob(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2), torch.tensor(0.0))
    tensor([-3.8379])
    """
    unusual = None if scale == "logvar" else scale
    if known := event_ndim_of_common_call(event_ndim, (x, mean, logvar), "logvar", unusual):
        return apply(LikelihoodFunction, NORMAL, known, x, mean, logvar)
    location, spread = arguments.as_tensors(x, mean, logvar)
    arguments.check_tensors(x=x, mean=location, logvar=spread)
    shape = arguments.broadcast_shape(x=x, mean=location, logvar=spread)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    spread = _fit_logvar(as_logvar("scale", spread, scale, x, location), shape, event_ndim)
    given = arguments.expand(x, shape), arguments.expand(location, shape), spread
    event_ndim, *tensors = arguments.as_events(event_ndim, *given)
    return apply(LikelihoodFunction, NORMAL, event_ndim, *tensors)
