"""The squared MMD of two samples as a registered op with its gradient, which several public functions use.

The forward pass computes value and gradient in one sweep over the pairs. The value is one number, so it is enough to
save the gradient, of the inputs' size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import apply, differentiable, needs_closed_form, register, same
from fastkl.ops.pairs import _pairs


def _fake(x, y, kernel, scales, unbiased, dx, dy) -> list[Tensor]:
    dtype = reference.compute_dtype(x, y)
    return [x.new_empty((), dtype=torch.float64), *(z.new_empty(z.shape, dtype=dtype) for z in [x] * dx + [y] * dy)]


mmd_sums = register(
    "mmd(Tensor x, Tensor y, str kernel, float[] scales, bool unbiased, bool dx, bool dy) -> Tensor[]",
    closed_form=_pairs.mmd,
    fake=_fake,
    kernel="pairs.mmd.fwd",
)


class _MMD(torch.autograd.Function):
    @staticmethod
    def forward(x, y, kernel, scales, unbiased, dx, dy):
        return tuple(mmd_sums(x, y, kernel, scales, unbiased, dx, dy))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[2:5]

    @staticmethod
    def backward(ctx, dvalue, *_):
        if dvalue is None:
            return (None,) * 7
        x, y, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if needs_closed_form(dvalue):
            return *_pairs.mmd_gradients(dvalue, x, y, *ctx.settings), *[None] * 5
        if len(kept) != sum(wanted):  # a gradient is needed that forward did not compute
            kept = mmd_sums(x, y, *ctx.settings, *wanted)[1:]
        found = iter(kept)
        gradients = [next(found).mul(dvalue).to(z.dtype) if ask else None for z, ask in zip((x, y), wanted)]
        return *gradients, *[None] * 5

    @staticmethod
    def vmap(info, in_dims, x, y, *settings):
        examples = arguments.examples(info.batch_size, in_dims[:2], (x, y))
        results = [apply(_MMD, *example, *settings) for example in examples]
        return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])


differentiable("mmd", _MMD, same)


def mmd(x: Tensor, y: Tensor, kernel: str, scales: tuple[float, ...], unbiased: bool) -> Tensor:
    """The squared MMD of checked x [N, D] and y [M, D]. float64, because it is a difference of large sums to which
    callers may add more."""
    asked = [torch.is_grad_enabled() and z.requires_grad for z in (x, y)]
    return apply(_MMD, x, y, kernel, list(scales), unbiased, *asked)[0]


def check_scales(scales: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(scales)
    except TypeError:
        raise TypeError(f"scales must be a sequence of numbers, got {type(scales).__name__}") from None
    if not numbers:
        raise ValueError("scales must hold at least one number")
    return tuple(arguments.check_number("scales", number, above=True) for number in numbers)


def check_estimator(estimator: str, **rows: int) -> bool:
    """Whether the estimator is unbiased. `rows` are counted over all processes of a group."""
    unbiased = arguments.check_choice("estimator", estimator, reference.MMD_ESTIMATORS) == "unbiased"
    for name, count in rows.items():
        if count < 1 + unbiased:
            least = "2 rows for an unbiased estimate" if unbiased else "1 row"
            raise ValueError(f"{name} must have at least {least}, got {count}")
    return unbiased


def check_points(name: str, points: Tensor) -> Tensor:
    """Check points and flatten each event: [N, D]."""
    if points.dim() < 2 or 0 in points.shape[1:]:
        raise ValueError(f"{name} must be [N, D] with at least one dimension D, got shape {tuple(points.shape)}")
    return points.flatten(1)
