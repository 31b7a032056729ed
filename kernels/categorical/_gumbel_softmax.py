"""Shared device code of Gumbel-Softmax: the noise, the position of a tile, and the temperature."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkl.kernels._device import LN2, LOG2E, philox
from fastkl.kernels.normal.rsample_kl import shifted_columns

NOT_A_CLASS = tl.constexpr(2147483647)


@triton.jit
def log(x):
    """ln x of a positive normal float32, within a relative error of 1e-7, in half the instructions of tl.log. With
    x = 2^n (1 + f), 1 + f from sqrt(1/2) to sqrt(2), it is n ln 2 + f + f^2 q(f), q a minimax polynomial."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -8388608  # n 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = -0.14307516813 + f * 0.08734829724
    q = -0.16570508480 + f * (0.14917975664 + f * q)
    q = -0.25001755357 + f * (0.19962072372 + f * q)
    q = -0.49999991059 + f * (0.33333951235 + f * q)
    return exponent.to(tl.float32) * (LN2 * 2.0**-23) + (f + f * f * q)


@triton.jit
def gumbel(word):
    """-ln(-ln u), u = (word + 1/2) / 2^32, in float32; near 1 from 1 - u, so that both tails are accurate."""
    signed = word.to(tl.int32, bitcast=True)
    low = signed >= 0
    tail = (signed ^ (signed >> 31)).to(tl.float32) * 2.0**-32 + 2.0**-33  # u or 1 - u, at most 1/2
    u = tl.where(low, tail, 1.0 - tail)
    rounding = tl.where(low, 0.0, (u - 1.0) + tail)  # the rounding error of 1 - tail, which dominates ln u near 1
    return -log(rounding - log(u))


@triton.jit
def four(seed, group, index, stream):
    word_0, word_1, word_2, word_3 = philox(seed, group, index, 0, stream)
    return gumbel(word_0), gumbel(word_1), gumbel(word_2), gumbel(word_3)


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
    # join adds a last dimension, so values joined last are neighbours. Four of them, for 16-bit logits eight, stay in
    # one thread, which matches the layout of the logits.
    group = (begin + first) >> 2
    if HALF and COLUMNS >= 8:
        even = 2 * tl.arange(0, COLUMNS // 8)[None, :]
        noise_0, noise_1, noise_2, noise_3 = four(seed, group, even, stream)
        noise_4, noise_5, noise_6, noise_7 = four(seed, group, even + 1, stream)
        noise_0, noise_1 = tl.join(noise_0, noise_4), tl.join(noise_1, noise_5)
        noise_2, noise_3 = tl.join(noise_2, noise_6), tl.join(noise_3, noise_7)
    else:
        noise_0, noise_1, noise_2, noise_3 = four(seed, group, tl.arange(0, COLUMNS // 4)[None, :], stream)
    return tl.join(tl.join(noise_0, noise_2), tl.join(noise_1, noise_3)).reshape(ROWS, COLUMNS)


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
