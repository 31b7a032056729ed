"""Shared device code of Gumbel-Softmax: the noise, the position of a tile, and the temperature."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkl.kernels._device import LOG2E
from fastkl.kernels._noise import four_gumbels, gumbel, neighbours, philox, shifted_columns

NOT_A_CLASS = tl.constexpr(2147483647)


@triton.jit
def noise(seed, stream, line, first, column, length, AXIS: tl.constexpr, ODD: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """reference.gumbel_noise of the elements line * length + column; `first`, the first column, is a multiple of 4."""
    begin = line.to(tl.int64)[:, None] * length
    if AXIS == 0 and ODD:  # lines start at different words of a Philox call, so each element needs its own call
        index = begin + column
        word_0, word_1, word_2, word_3 = philox(seed, index >> 2, tl.arange(0, 1)[None, :], 0, stream)
        pair_0, pair_1 = tl.where((index & 2) == 0, word_0, word_2), tl.where((index & 2) == 0, word_1, word_3)
        return gumbel(tl.where((index & 1) == 0, pair_0, pair_1))
    return neighbours(four_gumbels, seed, (begin + first) >> 2, 0, stream, ROWS, COLUMNS, HALF, HALF)


@triton.jit
def tile(block, start, shape, column_blocks, AXIS: tl.constexpr, ODD: tl.constexpr, ROWS: tl.constexpr,
         COLUMNS: tl.constexpr):  # fmt: skip
    """(line, first column, column, class, distribution, mask) of a tile whose classes begin at `start`."""
    if AXIS == 1:
        line = block * ROWS + tl.arange(0, ROWS)
        column = shifted_columns(line, start, shape[1], ODD, COLUMNS)
        mask = (line < shape[0])[:, None] & (column >= 0) & (column < shape[1])
        return line, start, column, column, line, mask
    else:
        index = start + tl.arange(0, ROWS)
        first = block % column_blocks * COLUMNS
        column = first + tl.arange(0, COLUMNS)
        mask = (index < shape[1])[:, None] & (column < shape[2])[None, :]
        outer = (block // column_blocks).to(tl.int64)
        return outer * shape[1] + index, first, column[None, :], index[:, None], outer * shape[2] + column, mask


@triton.jit
def offsets(block, line, column, index, strides, column_blocks, AXIS: tl.constexpr):
    if AXIS == 1:
        return line.to(tl.int64)[:, None] * strides[0] + index.to(tl.int64) * strides[1]
    else:
        outer = (block // column_blocks).to(tl.int64) * strides[0]
        return outer + index.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[2]


@triton.jit
def perturbed(at, mask, seed, stream, line, first, column, shape, AXIS: tl.constexpr, ODD: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A tile of logits with the noise added."""
    values = tl.load(at, mask, other=float("-inf")).to(DTYPE)  # a weight of 0
    HALF: tl.constexpr = at.dtype.element_ty.primitive_bitwidth == 16
    length = shape[AXIS * -1 + 2]
    return values + noise(seed, stream, line, first, column, length, AXIS, ODD, ROWS, COLUMNS, HALF).to(DTYPE)


@triton.jit
def temperature(tau, TENSOR: tl.constexpr, DTYPE: tl.constexpr):
    """(log2(e) / tau, 1 / tau for the gradient, whether tau is 0), from a number 1 / tau or a pointer to tau."""
    if TENSOR:
        value = tl.load(tau).to(DTYPE)
        # The smallest normal number: its inverse is finite, and separates all classes but ties. It has all digits in
        # float32, because Triton 3.6 would take a value rounded below it for a float64.
        smallest: tl.constexpr = 1.1754943508222875e-38 if value.dtype == tl.float32 else 2.2250738585072014e-308
        inverse = 1.0 / tl.maximum(value, smallest)
        inverse = tl.where(value >= 0.0, inverse, float("nan"))
        return inverse * LOG2E, tl.where(value == 0.0, 0.0, inverse), value == 0.0
    else:
        return tau * LOG2E, tau, False


@triton.jit
def first_maximum(values, index, top, AXIS: tl.constexpr):
    return tl.min(tl.where(values == top, index, NOT_A_CLASS), axis=AXIS, keep_dims=True)
