"""Shared code of total_correlation's kernels: posteriors prepared for the pair loop, its tile and its exponents.

With s = exp(-logvar / 2) sqrt(log2(e) / 2) and t = (z - mu) s, a density is 2^(log2 s - t^2) sqrt(ln 2 / pi): each
(i, j, d) takes a difference, two products, one exponential and the sums. Exponents are relative to row i's own
posterior, from which z_i was drawn, so the sums need no running maximum. Rows so far from their own posterior that this
overflows are recomputed relative to the densest posterior at each d.

A tile is [REGISTERS, OWN, GROUPS, LANES, STEPS]: d = step * REGISTERS + register, the program's own rows (or
posteriors) group * OWN + own, and LANES of the others. Triton assigns the last dimensions to threads and warps first. A
thread holds REGISTERS x OWN sums, and uses each load of REGISTERS neighbours for OWN of its rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import TRITON_DTYPE, exp
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, next_power_of_2, registers

MOST_COLUMNS = 512  # more would spill; the closed form serves larger inputs
SCALE = tl.constexpr(0.8493218002880191)  # sqrt(log2(e) / 2)
LOG2_SCALE = tl.constexpr(-0.23561681352755115)
HALF_LOG2E = tl.constexpr(0.7213475204444817)


@triton.jit
def prepare_kernel(
    mu, logvar, means, roots, logs, batch, columns, mu_strides, logvar_strides,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """means, s and log2 s [batch padded, COLUMNS]; log2 s is exact even if s underflows or is clamped."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = (column < columns)[None, :]
    mask = (row < batch)[:, None] & real
    wide, narrow = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    m = tl.load(mu + wide * mu_strides[0] + narrow * mu_strides[1], mask, other=0.0).to(DTYPE)
    v = tl.load(logvar + wide * logvar_strides[0] + narrow * logvar_strides[1], mask, other=0.0).to(DTYPE)
    # Padding has t = 0. A padded dimension has density 1 for all posteriors; a padded posterior has density 0.
    at = wide * COLUMNS + narrow
    tl.store(means + at, m)
    # Clamped, because infinity times a difference of 0 would be NaN.
    root = tl.minimum(exp(v, -0.5) * SCALE, 1e308 if tl.float64 == DTYPE else 1e38, tl.PropagateNan.ALL)
    tl.store(roots + at, tl.where(mask, root, 0.0))
    tl.store(logs + at, tl.where(mask, LOG2_SCALE - v * HALF_LOG2E, tl.where(real, float("-inf"), 0.0)))


@triton.jit
def column_index(REGISTERS: tl.constexpr, STEPS: tl.constexpr):
    return (
        tl.arange(0, REGISTERS)[:, None, None, None, None]
        + (tl.arange(0, STEPS) * REGISTERS)[None, None, None, None, :]
    )


@triton.jit
def own_index(OWN: tl.constexpr, GROUPS: tl.constexpr):
    return tl.arange(0, OWN)[None, :, None, None, None] + (tl.arange(0, GROUPS) * OWN)[None, None, :, None, None]


@triton.jit
def other_index(LANES: tl.constexpr):
    return tl.arange(0, LANES)[None, None, None, :, None]


@triton.jit
def over_columns(x):
    """The sum over d, [1, OWN, GROUPS, LANES, 1]."""
    return tl.expand_dims(tl.expand_dims(tl.sum(tl.sum(x, axis=0), axis=3), 0), 4)


@triton.jit
def over_others(x):
    return tl.expand_dims(tl.sum(x, axis=3), 3)


@triton.jit
def most_over_others(x):
    return tl.expand_dims(tl.max(x, axis=3), 3)


@triton.jit
def bounded(t):
    """t clamped to finite values: an infinite distance has weight 0, and 0 * inf would be NaN."""
    most: tl.constexpr = 1e308 if t.dtype == tl.float64 else 3.4e38
    return tl.minimum(tl.maximum(t, -most), most)


@triton.jit
def pair_weight(own, other, head, end, own_weight, next_weight):
    """w_ij relative to the weight of an unrelated pair; `own` and `other` are indices of posteriors and broadcast. The
    whole batch is from `head`, at most 0, to `end`."""
    following = tl.where(own + 1 == end, head, own + 1)
    return tl.where(other == own, own_weight, tl.where(other == following, next_weight, 1.0))


@triton.jit
def references(
    z, origins, shift, far, means, roots, logs, padded,
    REGISTERS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(origins, shift) with values of the densest posterior, at each d and jointly, for rows `far` from their own."""
    COLUMNS: tl.constexpr = REGISTERS * STEPS
    at = other_index(LANES) * COLUMNS + column_index(REGISTERS, STEPS)
    densest = (z + at) * 0.0 + float("-inf")
    for start in range(0, padded, LANES):
        here = start * COLUMNS + at
        t = (z - tl.load(means + here)) * tl.load(roots + here)
        densest = tl.maximum(densest, tl.load(logs + here) - t * t)
    origins = tl.where(far, -most_over_others(densest), origins)
    most = (over_columns(z) + other_index(LANES)) * 0.0 + float("-inf")
    for start in range(0, padded, LANES):
        here = start * COLUMNS + at
        t = (z - tl.load(means + here)) * tl.load(roots + here)
        most = tl.maximum(most, over_columns((origins + tl.load(logs + here)) - t * t))
    return origins, tl.where(far, most_over_others(most), shift)


def pad(count: int) -> int:
    """Rows and posteriors are padded to whole tiles."""
    return min(128, max(16, next_power_of_2(count)))


def tile(columns: int, own: int, others: int, dtype: torch.dtype) -> dict:
    """Launch options for four warps. With many programs each warp has its own few rows; with few programs all warps
    share the rows and split the others among them."""
    half = dtype == torch.float64
    columns = next_power_of_2(columns)
    in_thread = min(4 if half else 8, columns)
    steps = columns // in_thread
    each = 2 >> half  # more would spill
    groups = min(4, max(1, 128 // max(32, steps))) if own >= 2048 * each else 1
    lanes = max(1, min(pad(others), 128 // steps // groups))
    warps = max(1, min(4, lanes * steps * groups // 32))
    shape = {"REGISTERS": in_thread, "OWN": each, "GROUPS": groups, "LANES": lanes, "STEPS": steps}
    return {**shape, "num_warps": warps, **registers(255)}


def prepare(mu: torch.Tensor, logvar: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """[means, roots, logs]."""
    batch, columns = mu.shape
    padded, width = cdiv(batch, pad(batch)) * pad(batch), next_power_of_2(columns)
    prepared = [torch.empty((padded, width), dtype=dtype, device=mu.device) for _ in range(3)]
    rows = max(1, min(16, 256 // width))  # four neighbours for each of 64 threads
    launch(
        prepare_kernel, (padded // rows,),
        mu, logvar, *prepared, batch, columns, mu.stride(), logvar.stride(),
        DTYPE=TRITON_DTYPE[dtype], ROWS=rows, COLUMNS=width, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return prepared
