"""The kernels' view of strided tensors: rows by columns, each made of at most two dimensions, without copies.

Plain Python on shapes and strides, run on the host before a launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

# Rows that a program sums at least for a prior or a scale that the batch shares: the partial sums stay a small part of
# the traffic.
SHARED_ROWS = 32
# Enough programs to fill a large GPU several times. Fixed, so that the order of summation is the same on every GPU.
PROGRAMS = 1024
NO_STRIDES = (0, 0, 0, 0)  # of a missing tensor
T = TypeVar("T")
DENSE = torch.contiguous_format
TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
OLD_COMPILER = TRITON < (3, 7)  # uses more registers, so the few tiles that would spill are smaller
SPILLS_A_FEW = (3, 6) <= TRITON <= (3, 8)  # 8 to 32 bytes in about a dozen launches, unless given more registers
DOT_TAKES_FLOAT64 = TRITON >= (3, 5)


class View(NamedTuple):
    """The properties of a tensor that a launch depends on, except its address."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def dense(shape: torch.Size, dtype: torch.dtype) -> View:
        return View(shape, contiguous_strides(shape), dtype)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def dim(self) -> int:
        return len(self.shape)

    def expand(self, shape: torch.Size) -> View:
        """The view of tensor.expand(shape)."""
        own = [step * (size > 1) for size, step in zip(self.shape, self.strides)]
        return View(shape, (*[0] * (len(shape) - len(own)), *own), self.dtype)

    def of_rows(self, shape: torch.Size) -> View:
        """The view of one value per row, expanded to the whole shape."""
        return View(shape, (*self.strides, *[0] * (len(shape) - len(self.shape))), self.dtype)


def view(tensor: Tensor) -> View:
    return View(tensor.shape, tensor.stride(), tensor.dtype)


def views(*tensors: Tensor | None) -> Any:
    """A tuple of the tensors' views, None for a missing tensor."""
    return tuple([None if tensor is None else view(tensor) for tensor in tensors])


class Layout(NamedTuple):
    shape: tuple[int, int, int, int]  # rows, inner rows, columns, inner columns
    strides: tuple[tuple[int, ...], ...]  # outer row, inner row, outer column, inner column; one per tensor

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[2]

    @property
    def nested(self) -> int:
        """Which axes consist of two dimensions: 1 the rows, 2 the columns, 3 both."""
        rows, row_inner, columns, column_inner = self.shape
        return (row_inner < rows) + 2 * (column_inner < columns)


def _coalesce(sizes: list[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dimensions that every tensor can traverse with one stride."""
    out_sizes: list[int] = []
    out_strides: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        if out_sizes and all(out[-1] == size * own[dim] for out, own in zip(out_strides, strides)):
            out_sizes[-1] *= size
            for out, own in zip(out_strides, strides):
                out[-1] = own[dim]
        else:
            out_sizes.append(size)
            for out, own in zip(out_strides, strides):
                out.append(own[dim])
    return out_sizes, out_strides


def layout(views: Sequence[View | None], event_ndim: int, *, reorder: bool = True) -> Layout | None:
    """Rows and columns of tensors of one shape, or None if an axis needs more than two dimensions. The strides of a
    missing tensor are 0.

    `reorder` sorts the columns by memory order (such as channels_last), for ops that may sum in any order.
    """
    found = _layout(present(views), event_ndim, reorder)
    if found is None:
        return None
    strides = iter(found.strides)
    return Layout(found.shape, tuple([NO_STRIDES if view is None else next(strides) for view in views]))


def _layout(views: list[View], event_ndim: int, reorder: bool) -> Layout | None:
    shape = views[0].shape
    if 0 in shape:
        rows, columns = shape[: len(shape) - event_ndim].numel(), shape[len(shape) - event_ndim :].numel()
        return Layout((rows, rows, columns, columns), (NO_STRIDES,) * len(views))
    if len(shape) == 2 and event_ndim == 1:  # the same as below, eight times faster
        rows, columns = shape
        pairs = [view.strides for view in views]
        flat = tuple([(0, row * (rows > 1), 0, column * (columns > 1)) for row, column in pairs])
        return Layout((rows, rows, columns, columns), flat)
    batch = list(range(len(shape) - event_ndim))
    event = list(range(len(shape) - event_ndim, len(shape)))
    if reorder:
        event.sort(key=lambda dim: tuple(-view.strides[dim] for view in views))
    axes = []
    for dims in (batch, event):
        sizes, strides = _coalesce([shape[d] for d in dims], [[view.strides[d] for d in dims] for view in views])
        if len(sizes) > 2:
            return None
        missing = 2 - len(sizes)
        axes.append(([1] * missing + sizes, [[0] * missing + own for own in strides]))
    (row_sizes, row_strides), (column_sizes, column_strides) = axes
    nested = tuple([(*outer, *inner) for outer, inner in zip(row_strides, column_strides)])
    return Layout((math.prod(row_sizes), row_sizes[1], math.prod(column_sizes), column_sizes[1]), nested)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """The strides of a matrix, or zeros if it is missing."""
    return (0, 0) if tensor is None else tensor.stride()


def finish(outputs: Sequence[Tensor | None], found: Iterable[Tensor | None]) -> None:
    """What was found elsewhere goes to the outputs; one that is None is not wanted."""
    for output, own in zip(outputs, found):
        if output is not None and own is not None and output is not own:
            output.copy_(own)


def place(output: Tensor | None, like: Tensor) -> Tensor:
    """The output, or a new tensor for a result that a kernel writes along with others and nobody wants."""
    return torch.empty_like(like) if output is None else output


def places(outputs: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [output if like is None else place(output, like) for output, like in zip(outputs, inputs)]


def clear(outputs: Sequence[Tensor | None]) -> None:
    """Gradients of tensors without elements: those of a prior that an empty batch shares are 0."""
    for output in outputs:
        if output is not None:
            output.zero_()


def contiguous(*tensors: Tensor | None) -> Any:
    """Copies that two dimensions an axis describe."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def on_copies(write: Callable[..., None], inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
    """write(inputs, outputs) for views that no two dimensions an axis describe, by way of contiguous copies."""
    found = [None if tensor is None else torch.empty_like(tensor, memory_format=DENSE) for tensor in outputs]
    write(contiguous(*inputs), found)
    finish(outputs, found)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def compute_dtype(tensors: Sequence[Tensor | View | None]) -> torch.dtype:
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def expanded(views: Sequence[View | None], shape: torch.Size) -> list[View | None]:
    return [None if view is None else view.expand(shape) for view in views]


def present(items: Sequence[T | None]) -> list[T]:
    return [item for item in items if item is not None]


def is_bounded(low: float, high: float) -> bool:
    return low > float("-inf") or high < float("inf")


def registers(most: int) -> dict[str, int]:
    """A launch option: the maximum number of registers per thread. Without it ptxas sometimes uses fewer, to run more
    programs at once, and spills two registers. AMD's compiler has no such option."""
    return {} if torch.version.hip else {"maxnreg": most}


def share(total: int, block: int, programs: int) -> tuple[int, int]:
    """(length, count): `total` split into at most `programs` equal lengths, each a multiple of `block`."""
    length = max(1, cdiv(cdiv(total, max(1, programs)), block)) * block
    return length, max(1, cdiv(total, length))


def share_rows(rows: int, block_rows: int, column_blocks: int, at_least: int = SHARED_ROWS) -> tuple[int, int]:
    """(rows per program, groups of rows) where each group sums its rows for every block of columns."""
    return share(rows, block_rows, min(PROGRAMS // column_blocks, cdiv(rows, at_least)))


def first_sample(view: View | None, num_samples: int | None, like: View) -> tuple[View, int]:
    """(the first sample's view, the stride to the next); no strides if the tensor is missing."""
    if view is None or num_samples == 0:
        return View(like.shape, (0,) * like.dim(), like.dtype), 0
    if num_samples is None:
        return view, 0
    return View(view.shape[1:], view.strides[1:], view.dtype), view.strides[0]


def longest_event(views: list[View]) -> int:
    """How many dimensions to treat as columns when only samples are wanted, which need no event: as many as are
    contiguous, so that no Philox calls are wasted at the ends of short rows, but below 2^31 columns (32-bit counts)."""
    ndim = views[0].dim()
    for candidate in range(ndim, 0, -1):
        found = layout(views, candidate, reorder=False)
        if found is not None and found.nested < 2 and found.columns < 2**31:
            return candidate
    return min(1, ndim)
