"""Log-likelihood of independent normal variables, one value per sample."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import apply, differentiable, needs_closed_form, register, same

# x and mean are of the full shape [*batch, *event]. logvar is too, or it is [*batch, 1, ..., 1] (one value per row), or
# [*event] (shared by the batch); its gradient is then summed inside the kernel.


def _fit_logvar(logvar: Tensor, shape: torch.Size, event_ndim: int) -> Tensor:
    batch_ndim = len(shape) - event_ndim
    own = logvar.shape[max(0, logvar.dim() - event_ndim) :]
    if math.prod(own) == 1:
        return arguments.expand(logvar, (*shape[:batch_ndim], *[1] * event_ndim))
    if batch_ndim and arguments.is_shared(logvar, event_ndim):
        return arguments.expand(logvar.reshape(own), shape[batch_ndim:])
    return arguments.expand(logvar, shape)


def _forward(x, mean, logvar, event_ndim) -> Tensor:
    density = functools.partial(reference.normal_log_prob, event_ndim=event_ndim)
    return arguments.by_rows(density, x, event_ndim, [x, mean, logvar])


def _gradients(dlog_prob, x, mean, logvar, event_ndim, wanted) -> list[Tensor]:
    """Closed form in differentiable torch ops, one gradient for each of (x, mean, logvar) that is wanted."""
    dtype = reference.compute_dtype(x, mean, logvar)
    dlog_prob = dlog_prob.to(dtype).reshape(*dlog_prob.shape, *[1] * event_ndim)
    dmean, dlogvar = reference.normal_terms_gradient(dlog_prob, x.to(dtype), mean.to(dtype), logvar.to(dtype))
    gradients = zip((-dmean, dmean, dlogvar), (x, mean, logvar), wanted)
    return [gradient.sum_to_size(t.shape).to(t.dtype) for gradient, t, want in gradients if want]


def _backward(dlog_prob, x, mean, logvar, event_ndim, wanted) -> list[Tensor]:
    gradients = _gradients(dlog_prob, x, mean, logvar, event_ndim, wanted)
    return list(map(arguments.match, gradients, [t for t, want in zip((x, mean, logvar), wanted) if want]))


def _fake_forward(x, mean, logvar, event_ndim) -> Tensor:
    return x.new_empty(x.shape[: x.dim() - event_ndim], dtype=reference.compute_dtype(x, mean, logvar))


def _fake_backward(dlog_prob, x, mean, logvar, event_ndim, wanted) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor, want in zip((x, mean, logvar), wanted) if want]


normal_log_prob_fwd = register(
    "normal_log_prob_fwd(Tensor x, Tensor mean, Tensor logvar, int event_ndim) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="normal_log_prob.fwd",
    native="likelihood.normal_log_prob_fwd",
)
normal_log_prob_bwd = register(
    "normal_log_prob_bwd(Tensor dlog_prob, Tensor x, Tensor mean, Tensor logvar, int event_ndim, bool[] wanted)"
    " -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="normal_log_prob.bwd",
    native="likelihood.normal_log_prob_bwd",
)


class _NormalLogProb(torch.autograd.Function):
    @staticmethod
    def forward(x, mean, logvar, event_ndim):
        return normal_log_prob_fwd(x, mean, logvar, event_ndim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.event_ndim = inputs[3]

    @staticmethod
    def backward(ctx, dlog_prob):
        wanted = list(ctx.needs_input_grad[:3])
        backward = _gradients if needs_closed_form(dlog_prob) else normal_log_prob_bwd
        gradients = iter(backward(dlog_prob, *ctx.saved_tensors, ctx.event_ndim, wanted))
        return (*(next(gradients) if want else None for want in wanted), None)

    @staticmethod
    def vmap(info, in_dims, x, mean, logvar, event_ndim):
        x, mean = (arguments.batch_first(t, dim, info.batch_size) for t, dim in zip((x, mean), in_dims))
        if in_dims[2] is not None:
            logvar = logvar.movedim(in_dims[2], 0)
            logvar = logvar.reshape(logvar.shape[0], *[1] * (x.dim() - logvar.dim()), *logvar.shape[1:])
        return apply(_NormalLogProb, x, mean, _fit_logvar(logvar, x.shape, event_ndim), event_ndim), 0


differentiable("normal_log_prob_fwd", _NormalLogProb, same)


def normal_log_prob(
    x: Tensor, mean: Tensor | float, logvar: Tensor | float, *, event_ndim: int | None = None
) -> Tensor:
    """Log-likelihood of `x` under independent normal variables, in nats, one value per sample.

    ln p(x) = -1/2 sum_d [ln 2 pi + logvar_d + (x_d - mean_d)^2 / exp(logvar_d)]

    Args:
        x, mean: data and its reconstruction, [*batch, *event]; they broadcast (for importance samples [L, N, *event]
            x is read where it lies, L times), and their dtypes may differ.
        logvar: ln sigma^2, broadcasts with them; it and the mean may be numbers. Where it has one value per sample
            ([N, 1, ..., 1]) or one in all (0-d: the learned variance of the sigma-VAE), or one per dimension of the
            event that the batch shares, its gradient is summed inside the kernel.
        event_ndim: how many of the last dimensions are summed. None: every dimension after the first; one dimension
            alone is that of one datum. 0: none, each element has a value. With a dimension of importance samples in
            front it has to be given.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients come in each
        input's dtype, those that are wanted; nothing is saved for the backward pass beyond the inputs.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes that do not broadcast, mixed devices, event_ndim out of range.

    Source: Rybkin, Daniilidis and Levine 2021, "Simple and Effective VAE Training with Calibrated Decoders",
    arXiv:2006.13202, equation 2.

    >>> import torch, fastkl
    >>> fastkl.normal_log_prob(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2), torch.tensor(0.0))
    tensor([-3.8379])
    """
    if known := arguments.alike(event_ndim, x, mean, logvar):
        return apply(_NormalLogProb, x, mean, logvar, known)
    mean, logvar = arguments.as_tensors(x, mean, logvar)
    arguments.check_tensors(x=x, mean=mean, logvar=logvar)
    shape = arguments.broadcast_shape(x=x, mean=mean, logvar=logvar)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    logvar = _fit_logvar(logvar, shape, event_ndim)
    tensors = arguments.expand(x, shape), arguments.expand(mean, shape), logvar
    event_ndim, *tensors = arguments.as_events(event_ndim, *tensors)
    return apply(_NormalLogProb, *tensors, event_ndim)
