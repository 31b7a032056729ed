"""Shared code of both directions of one mixture per datum: the tile, a component's density, and loads."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import exp, not_infinite
from fastkl.kernels._layout import next_power_of_2, registers

LN_2PI = tl.constexpr(1.8378770664093453)
# Elements of a tile per thread, and the longest row that one program holds.
THREAD_TILE = {torch.float32: 8, torch.float64: 4}
LONGEST = {torch.float32: 2048, torch.float64: 1024}


def blocks(size: torch.Size, dtype: torch.dtype, form: str) -> dict[str, int]:
    """A tile of (DATA x COMPONENTS) pairs by columns, for means of this shape."""
    data, components, columns = size
    tile = 128 * THREAD_TILE[dtype]
    if columns % 16:  # unaligned rows need registers for more addresses
        tile //= 2
    block_columns = next_power_of_2(columns) if columns <= LONGEST[dtype] else tile
    warps = max(4, 4 * block_columns // tile)
    pairs = max(1, tile // block_columns // (2 if columns % 16 and form != "point" else 1))
    block_components = min(next_power_of_2(components), pairs)
    block_data = min(next_power_of_2(data), pairs // block_components)
    shape = {"DATA": block_data, "COMPONENTS": block_components, "COLUMNS": block_columns}
    return {**shape, "num_warps": warps, **registers(255)}


@triton.jit
def element(difference, logvars, variance, FORM: tl.constexpr):
    """(pull, precision, -2 ln density + constant) of one dimension of one component; pull = precision difference."""
    if FORM == "convolved":
        least = -700.0 if logvars.dtype == tl.float64 else -87.0  # a subnormal variance would have an inexact logarithm
        spread = not_infinite(exp(tl.maximum(logvars, least, tl.PropagateNan.ALL)) + variance)
        precision = 1.0 / spread
        pull = difference * precision
        return pull, precision, difference * pull + tl.log(spread)
    # Clamped, because infinity times a difference of 0 would be NaN.
    root = tl.minimum(exp(-0.5 * logvars), 1e300 if logvars.dtype == tl.float64 else 1e38, tl.PropagateNan.ALL)
    standard = difference * root
    precision = root * root
    terms = standard * standard + logvars
    if FORM == "expected":
        terms += variance * precision
    return standard * root, precision, terms


@triton.jit
def element_gradient(difference, logvars, variance, pull, precision, FORM: tl.constexpr):
    """Gradients in ln S of the component and in logvar of q."""
    if FORM == "convolved":
        half = 0.5 * (pull * pull - precision)
        of_component, of_row = exp(logvars) * half, variance * half
    else:
        scaled = variance * precision
        of_component, of_row = 0.5 * (difference * pull - 1.0), -0.5 * scaled
        if FORM == "expected":
            of_component += 0.5 * scaled
    return of_component, of_row


@triton.jit
def log_density(log_weight, terms, columns):
    return log_weight - 0.5 * (tl.sum(terms, axis=1) + (tl.zeros_like(log_weight) + columns) * LN_2PI)


@triton.jit
def place(first, second, column, strides):
    """Element offsets [pairs, columns] of tensor[first, second, column], in int64 for more than 2^31 elements."""
    at = first.to(tl.int64) * strides[0] + second.to(tl.int64) * strides[1]
    return at[:, None] + column.to(tl.int64)[None, :] * strides[2]


@triton.jit
def load_components(
    means, logvars, datum, component, column, shape, means_strides, logvars_strides, DTYPE: tl.constexpr
):
    """Neutral where masked: with z = m = 0, ln S = 0 and sigma = 0 all terms and differences are 0."""
    mask = (component < shape[2])[:, None] & (column < shape[3])[None, :]
    m = tl.load(means + place(datum, component, column, means_strides), mask, other=0.0).to(DTYPE)
    if logvars is None:
        v = tl.zeros_like(m)
    else:
        v = tl.load(logvars + place(datum, component, column, logvars_strides), mask, other=0.0).to(DTYPE)
    return m, v


@triton.jit
def load_rows(z, logvar, sample, datum, column, shape, z_strides, logvar_strides, DTYPE: tl.constexpr):
    """z and sigma^2 of the row, repeated for each of its datum's pairs; 0 if masked, see above."""
    mask = (sample >= 0)[:, None] & (column < shape[3])[None, :]
    x = tl.load(z + place(sample, datum, column, z_strides), mask, other=0.0).to(DTYPE)
    if logvar is None:
        variance = tl.zeros_like(x)
    else:
        at = place(sample, datum, column, logvar_strides)
        variance = exp(tl.load(logvar + at, mask, other=float("-inf")).to(DTYPE))
    return x, variance


@triton.jit
def load_log_weights(log_weights, sample, datum, component, shape, log_weights_strides):
    """Log-weights; -inf, a weight of zero, if masked."""
    at = (sample % shape[4]).to(tl.int64) * log_weights_strides[0] + datum.to(tl.int64) * log_weights_strides[1]
    at += component.to(tl.int64) * log_weights_strides[2]
    return tl.load(log_weights + at, component < shape[2], float("-inf"))


def by_sample(tensor: Tensor | None, data: int) -> Any:
    """[rows, ...] as [samples, data, ...], a view; None for a missing tensor."""
    return None if tensor is None else tensor.unflatten(0, (-1, data))


def strides_of(*tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    return tuple((0, 0, 0) if tensor is None else (*tensor.stride(), 0)[:3] for tensor in tensors)


def canonical(
    z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """(z, logvar, log-weights) as [samples, data, ...], means, and logvars expanded to their shape."""
    data, log_weights = len(means), torch.log_softmax(logits, -1, dtype=dtype)
    if len(logits) == 1:
        log_weights = log_weights.expand(data, -1)
    rows = by_sample(z, data), by_sample(logvar, data), by_sample(log_weights, data)
    return *rows, means, None if logvars is None else logvars.expand(means.shape)
