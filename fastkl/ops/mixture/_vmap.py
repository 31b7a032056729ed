"""The rule of torch.func.vmap for mixture ops with one result per row: one call for all examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops.mixture._mixture import Mixture


def vmap_call(
    call: Callable[[list[Tensor | None], Mixture], Sequence[Tensor]], size: int, dims: tuple, rows: tuple,
    mixture: tuple,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # fmt: skip
    """The return value of a Function's vmap, by one call(rows, mixture) -> tensors [R, ...] for all examples."""
    batched, data, per_datum = _mixture(mixture, dims[len(rows) : len(rows) + 4], size)
    outputs = call([None if t is None else _rows(t, dim, size, data, per_datum) for t, dim in zip(rows, dims)], batched)
    return tuple(_result(out, size, data, per_datum) for out in outputs), (0,) * len(outputs)


def _rows(tensor: Tensor, dim: int | None, size: int, data: int, per_datum: bool) -> Tensor:
    """Rows [R, ...] of each example as rows of one call: [examples, rows], or [samples, examples, data] if the mixture
    differs by example."""
    tensor = arguments.batch_first(tensor, dim, size)
    if per_datum:
        tensor = tensor.unflatten(1, (-1, data)).transpose(0, 1).flatten(1, 2)
    return tensor.flatten(0, 1)


def _result(tensor: Tensor, size: int, data: int, per_datum: bool) -> Tensor:
    """The inverse of _rows for a result [R', ...]: [examples, R, ...]."""
    if not per_datum:
        return tensor.unflatten(0, (size, -1))
    return tensor.unflatten(0, (-1, size, data)).transpose(0, 1).flatten(1, 2)


def _mixture(mixture: tuple, dims: tuple, size: int) -> tuple[Mixture, int, bool]:
    """(the mixture's tensors for all examples at once, data of each, whether parameters differ by example)."""
    per_datum = any(dim is not None for tensor, dim in zip(mixture, dims) if tensor is not None)
    lengths = [1 if t is None else t.shape[0 if dim is None or dim > 0 else 1] for t, dim in zip(mixture, dims)]
    data = max(lengths)
    if not per_datum:
        return Mixture(*mixture), data, False
    components_differ = any(dim is not None or length > 1 for dim, length in zip(dims[1:], lengths[1:]))
    batched: list[Any] = []
    for index, (tensor, dim, length) in enumerate(zip(mixture, dims, lengths)):
        if tensor is None:
            batched.append(None)
            continue
        must = components_differ and index in (1, 3)
        if dim is None and length == 1 and not must:
            batched.append(tensor)
            continue
        tensor = arguments.batch_first(tensor, dim, size)
        batched.append(arguments.expand(tensor, (size, data, *tensor.shape[2:])).flatten(0, 1))
    return Mixture(*batched), data, True
