"""Forward-mode derivatives of every Function, computed from its backward pass.

A backward pass is linear in the incoming gradients u: it gives J^T u. For tangents t of the inputs, the derivative of
t . (J^T u) in u is J t, the outgoing tangents. The differentiable form of a backward pass, used for second derivatives,
is plain torch ops, so torch.func.vjp gives J t for any nesting of transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastkl.ops._torch import outer_tangents


class Context(SimpleNamespace):
    """A stand-in for torch's ctx in setup_context and backward."""

    fixed: tuple[Tensor, ...] = ()
    materialize = True

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.fixed = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize = value


@functools.cache
def with_tangents(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`apply` of the Function with a jvp added. The Function itself has none because torch.compile rejects a jvp."""

    def context(ctx: Any, saved: list[Tensor | None], needs_input_grad: tuple[bool, ...]) -> Context:
        """The ctx for the Function's own backward."""
        count = len(ctx.others)
        inputs = [other if tensor is None else tensor for tensor, other in zip(saved, ctx.others)]
        own = Context(needs_input_grad=needs_input_grad)
        function.setup_context(own, tuple(inputs), saved[count] if ctx.single else tuple(saved[count:]))
        return own

    class WithTangents(function):  # type: ignore[valid-type, misc]
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            own = Context()
            function.setup_context(own, inputs, output)
            ctx.mark_non_differentiable(*own.fixed)
            ctx.set_materialize_grads(own.materialize)
            tensors = [value if isinstance(value, Tensor) else None for value in inputs]
            ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.single = isinstance(output, Tensor)
            outputs = [output] if ctx.single else output
            ctx.differentiable = [all(each is not fixed for fixed in own.fixed) for each in outputs]
            ctx.save_for_backward(*tensors, *outputs)
            ctx.save_for_forward(*tensors, *outputs)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            return function.backward(context(ctx, ctx.saved_tensors, ctx.needs_input_grad), *gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            # Drop the tangents of this level, since the derivative is taken at a point; keep those of outer levels,
            # which torch disables in a jvp.
            saved = [None if tensor is None else unpack_dual(tensor).primal for tensor in ctx.saved_tensors]
            own, outputs = context(ctx, saved, tuple(t is not None for t in tangents)), saved[len(ctx.others) :]
            moved: list[Tensor] = []

            def backward(*incoming: Tensor) -> tuple[Tensor, ...]:
                given = iter(incoming)
                gradients = function.backward(own, *(next(given) if is_ else None for is_ in ctx.differentiable))
                gradients = gradients if isinstance(gradients, tuple) else (gradients,)
                pairs = [(t, g) for t, g in zip(tangents, gradients) if t is not None and g is not None]
                moved[:] = [tangent for tangent, _ in pairs]
                return tuple(gradient for _, gradient in pairs)

            zeros = [torch.zeros_like(output) for output, is_ in zip(outputs, ctx.differentiable) if is_]  # type: ignore[arg-type]
            with outer_tangents():
                _, transposed = torch.func.vjp(backward, *zeros)  # type: ignore[misc]
                found = iter(transposed(tuple(moved)))
            results = tuple(next(found) if is_ else None for is_ in ctx.differentiable)
            return results[0] if ctx.single else results

    WithTangents.__name__ = WithTangents.__qualname__ = function.__name__
    return torch.compiler.disable(WithTangents.apply)
