"""Shared by the two likelihoods: one autograd.Function of tensors, with one value per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable


def write(outputs: tuple[Tensor | None, ...], gradients: list[Any]) -> None:
    """Write the wanted gradients into the outputs of a backward op."""
    for output, gradient in zip(outputs, gradients, strict=True):
        if output is not None:
            output.copy_(gradient)


class Likelihood:
    """A forward and a backward op of two tensors of the full shape and, optionally, a log-variance that may be smaller.

    gradients(dlog_prob, *tensors, event_ndim, wanted) is the closed form in differentiable torch ops, with None for
    unwanted gradients. fit(logvar, shape, event_ndim) brings the log-variance to a shape that the ops accept.
    """

    def __init__(
        self, fwd: Callable, bwd: Callable, name: str, gradients: Callable, fit: Callable | None = None
    ) -> None:
        self.fwd, self.bwd, self.gradients, self.fit = fwd, bwd, gradients, fit
        differentiable(name, LikelihoodFunction, self.inputs_of_function)

    def inputs_of_function(self, *given) -> tuple:
        """The Function's inputs, from the arguments of `fwd`."""
        *tensors, event_ndim = given
        return self, event_ndim, *tensors, *[None] * (3 - len(tensors))


class LikelihoodFunction(torch.autograd.Function):
    @staticmethod
    def forward(op, event_ndim, first, second, logvar):
        return op.fwd(first, second, event_ndim) if logvar is None else op.fwd(first, second, logvar, event_ndim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.event_ndim = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, dlog_prob):
        tensors = [tensor for tensor in ctx.saved_tensors if tensor is not None]
        wanted = ctx.needs_input_grad[2 : 2 + len(tensors)]
        if needs_closed_form(dlog_prob):
            gradients = ctx.op.gradients(dlog_prob, *tensors, ctx.event_ndim, wanted)
        else:
            gradients = [torch.empty_like(tensor) if want else None for tensor, want in zip(tensors, wanted)]
            ctx.op.bwd(dlog_prob, *tensors, *gradients, ctx.event_ndim)
        return None, None, *gradients, *[None] * (3 - len(tensors))

    @staticmethod
    def vmap(info, in_dims, op, event_ndim, first, second, logvar):
        first, second = (
            arguments.batch_first(tensor, dim, info.batch_size) for tensor, dim in zip((first, second), in_dims[2:])
        )
        if logvar is not None:
            if in_dims[4] is not None:
                logvar = logvar.movedim(in_dims[4], 0)
                logvar = logvar.reshape(logvar.shape[0], *[1] * (first.dim() - logvar.dim()), *logvar.shape[1:])
            logvar = op.fit(logvar, first.shape, event_ndim)
        return apply(LikelihoodFunction, op, event_ndim, first, second, logvar), 0
