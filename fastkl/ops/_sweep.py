"""One autograd.Function for values whose gradients are computed with them, in one sweep over the pairs of a batch.

A value is one number, so the Function saves only its gradients, which have the inputs' size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import differentiable

MOST = 4  # tensors


class Sweep:
    """A function of up to four tensors and of settings.

    compute(*tensors, *settings, *wanted) returns [value, the gradients of the wanted tensors], with a bool in `wanted`
    for each tensor. gradients, with the same arguments, returns a gradient for each tensor in differentiable torch ops,
    or None for an unwanted one. Without `gradients`, a second derivative raises RuntimeError(once).
    """

    def __init__(
        self, compute: Callable[..., Sequence[Tensor]],
        gradients: Callable[..., Sequence[Tensor | None]] | None = None, *, name: str | None = None, once: str = "",
    ) -> None:  # fmt: skip
        self.compute, self.gradients, self.once = compute, gradients, once
        if name is not None:  # then `compute` is the registered op of this name, and has two tensors
            differentiable(name, SweepFunction, self.inputs_of_function)

    def inputs_of_function(self, first: Any, second: Any, *rest: Any) -> tuple:
        """The Function's inputs, from the arguments of a registered op of two tensors."""
        return self, list(rest[:-2]), list(rest[-2:]), first, second, None, None

    def value(self, settings: list[Any], *tensors: Tensor) -> Tensor:
        """The value, differentiable in the tensors."""
        wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
        return apply(SweepFunction, self, settings, wanted, *tensors, *[None] * (MOST - len(tensors)))[0]


class SweepFunction(torch.autograd.Function):
    @staticmethod
    def forward(op, settings, wanted, first, second, third, fourth):
        return tuple(op.compute(*(first, second, third, fourth)[: len(wanted)], *settings, *wanted))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.settings, ctx.wanted = inputs[:3]
        ctx.save_for_backward(*inputs[3 : 3 + len(ctx.wanted)], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dvalue, *_):
        if dvalue is None:
            return (None,) * (3 + MOST)
        op, kept, count = ctx.op, ctx.wanted, len(ctx.wanted)
        saved = ctx.saved_tensors  # read once: checkpointing refuses a second time
        tensors, found = saved[:count], saved[count:]
        wanted = ctx.needs_input_grad[3 : 3 + count]
        again = needs_closed_form(dvalue)
        if again and op.gradients is not None:
            gradients = op.gradients(*tensors, *ctx.settings, *wanted)
        else:
            if any(want and not has for want, has in zip(wanted, kept)):  # forward did not compute it
                _, *found = op.compute(*tensors, *ctx.settings, *wanted)
                kept = wanted
            remaining = iter(found)
            gradients = [next(remaining) if has else None for has in kept]
        scaled = []
        for gradient, tensor, want in zip(gradients, tensors, wanted):
            if want and again and op.gradients is None:
                gradient = apply(_Once, op.once, gradient, *tensors, *[None] * (MOST - count))
            scaled.append((dvalue * gradient).to(tensor.dtype) if want else None)
        return None, None, None, *scaled, *[None] * (MOST - count)

    @staticmethod
    def vmap(info, in_dims, op, settings, wanted, *tensors):
        examples = arguments.examples(info.batch_size, in_dims[3:], tensors)
        return arguments.stacked([apply(SweepFunction, op, settings, wanted, *example) for example in examples])


class _Once(torch.autograd.Function):
    """A gradient unchanged. Its own gradient in the tensors on which it depends is unknown, and raises an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message, gradient, first, second, third, fourth):
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(ctx.message)
