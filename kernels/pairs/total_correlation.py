"""total_correlation: one forward kernel for the joint and all marginals, which writes no value per pair.

Backward has two kernels, in _total_correlation_gradient.py: by rows for z, by posteriors for mu and logvar.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import LN2
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, compute_dtype
from fastkl.kernels.pairs._total_correlation import (
    MOST_COLUMNS,
    column_index,
    other_index,
    over_columns,
    over_others,
    own_index,
    pair_weight,
    prepare,
    references,
    tile,
)
from fastkl.kernels.pairs._total_correlation_gradient import block_bwd, bwd

__all__ = ["block_bwd", "block_fwd", "bwd", "fwd"]

HALF_LOG_2LN2 = tl.constexpr(0.16331712998914047)  # 1/2 ln(2 ln 2), from the constants of a density and the prior


@triton.jit
def sums(
    z, origins, shift, own, row_start, means, roots, logs, head, end, padded, own_weight, next_weight,
    STRATIFIED: tl.constexpr, REGISTERS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sum_j w 2^(log2 s - t^2 + origin), and sum_j w 2^(the sum of these exponents over d - shift)."""
    COLUMNS: tl.constexpr = REGISTERS * STEPS
    at = other_index(LANES) * COLUMNS + column_index(REGISTERS, STEPS)
    marginal = (z + at) * 0.0
    joint = (shift + other_index(LANES)) * 0.0
    for start in range(0, padded, LANES):
        t = (z - tl.load(means + at)) * tl.load(roots + at)
        exponent = (origins + tl.load(logs + at)) - t * t
        means += LANES * COLUMNS
        roots += LANES * COLUMNS
        logs += LANES * COLUMNS
        density = tl.exp2(exponent)
        product = tl.exp2(over_columns(exponent) - shift)
        if STRATIFIED:
            # Weights differ from 1 only for a row's own posterior and the next one (after the last, the first).
            near = (start <= row_start + ROWS) & (start + LANES > row_start)
            if near | ((row_start + ROWS >= end) & (start == 0)):
                weight = pair_weight(own, start + other_index(LANES), head, end, own_weight, next_weight)
                marginal += density * weight
                joint += product * weight
            else:
                marginal += density
                joint += product
        else:
            marginal += density
            joint += product
    return over_others(marginal), over_others(joint)


@triton.jit
def total_correlation_fwd_kernel(
    z, means, roots, logs, own_means, own_roots, own_logs, mutual, total, dimension, joint_sum, marginal_sum, rows,
    columns, padded, first, first_own, head, end, dataset_size, z_strides,
    WHOLE: tl.constexpr, STRATIFIED: tl.constexpr, REGISTERS: tl.constexpr, OWN: tl.constexpr, GROUPS: tl.constexpr,
    LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = means.dtype.element_ty
    COLUMNS: tl.constexpr = REGISTERS * STEPS
    ROWS: tl.constexpr = OWN * GROUPS
    row = tl.program_id(0) * ROWS + own_index(OWN, GROUPS)
    column = column_index(REGISTERS, STEPS)
    real = column < columns
    mask = (row < rows) & real
    # Rows past the end repeat the last one, and dimensions past the end have weight 0.
    row = tl.minimum(row, rows - 1)
    wide = row.to(tl.int64)
    x = tl.load(z + wide * z_strides[0] + column.to(tl.int64) * z_strides[1], real, other=0.0).to(dtype)
    own = first + row
    at = (first_own + row).to(tl.int64) * COLUMNS + column
    t = (x - tl.load(own_means + at)) * tl.load(own_roots + at)
    own_squares, own_log = t * t, tl.load(own_logs + at)
    one = tl.sum(tl.full([1], 1.0, dtype=dtype), axis=0)
    others = one * (end - head - 1)
    own_weight, next_weight = others / dataset_size, (dataset_size - others) / dataset_size
    base = -tl.log2(others) if STRATIFIED else -(tl.log2(one * dataset_size) + tl.log2(one * (end - head)))
    row_start = first + tl.program_id(0) * ROWS
    origins, shift = own_squares - own_log, over_columns(x) * 0.0
    marginal, joint = sums(
        x, origins, shift, own, row_start, means, roots, logs, head, end, padded, own_weight, next_weight,
        STRATIFIED, REGISTERS, LANES, STEPS, ROWS,
    )  # fmt: skip
    inside = row_mask(rows, ROWS, OWN, GROUPS)
    if WHOLE:  # not the sums of a block, which the caller adds to those of others
        bad = tl.where(real & ~((marginal > 0.0) & (marginal < float("inf"))), 1.0, 0.0)
        far = (over_columns(bad) > 0.0) | ~((joint > 0.0) & (joint < float("inf")))
        any_far = tl.max(far.to(tl.int32))
        if any_far > 0:
            origins, shift = references(x, origins, shift, far, means, roots, logs, padded, REGISTERS, LANES, STEPS)
            marginal, joint = sums(
                x, origins, shift, own, row_start, means, roots, logs, head, end, padded, own_weight, next_weight,
                STRATIFIED, REGISTERS, LANES, STEPS, ROWS,
            )  # fmt: skip
        # All logarithms are relative to the same origins, which avoids cancellation.
        off = own_squares - (origins + own_log)  # rounding error only, except in far rows
        each = tl.where(real, tl.log2(tl.where(real, marginal, 1.0)) + base, 0.0)
        log_joint = tl.log2(joint) + shift + base
        of_prior = over_columns(tl.where(real, 0.5 * x * x + HALF_LOG_2LN2, 0.0))
        against_prior = over_columns(each - origins) * LN2 + of_prior
        tl.store(mutual + wide, (log_joint + over_columns(off)) * -LN2, inside)
        tl.store(total + wide, (log_joint - over_columns(each)) * LN2, inside)
        tl.store(dimension + wide, against_prior, inside)
        joint = tl.where(far, -joint, joint)
    tl.store(joint_sum + wide, joint, inside)
    tl.store(marginal_sum + wide * columns + column, marginal, mask)


@triton.jit
def row_mask(rows, ROWS: tl.constexpr, OWN: tl.constexpr, GROUPS: tl.constexpr):
    return tl.program_id(0) * ROWS + own_index(OWN, GROUPS) < rows


def fwd(z: Tensor, mu: Tensor, logvar: Tensor, first: int, dataset_size: int, stratified: bool) -> list[Tensor]:
    return _forward(z, mu, logvar, None, first, dataset_size, stratified, 0, mu.shape[0])


def block_fwd(
    z: Tensor, own_mu: Tensor, own_logvar: Tensor, mu: Tensor, logvar: Tensor, first: int, dataset_size: int,
    stratified: bool, start: int, total: int,
) -> list[Tensor]:  # fmt: skip
    """Sums over the posteriors from `start` on, a part of `total`, relative to the rows' own posteriors."""
    return _forward(z, mu, logvar, (own_mu, own_logvar), first, dataset_size, stratified, start, total)


def _forward(z, mu, logvar, own, first, dataset_size, stratified, start, total) -> list[Tensor]:
    rows, columns = z.shape
    if columns > MOST_COLUMNS:
        return NotImplemented
    dtype = compute_dtype([z, mu, logvar])
    empty: dict[str, Any] = {"dtype": dtype, "device": z.device}
    sums = [torch.empty(rows, **empty), torch.empty((rows, columns), **empty)]
    out: list[Any] = [None if own else torch.empty(rows, **empty) for _ in range(3)]
    if rows and columns:
        prepared = prepare(mu, logvar, dtype)
        of_rows = prepare(own[0], own[1], dtype) if own else prepared
        block = tile(columns, rows, mu.shape[0], dtype)
        launch(
            total_correlation_fwd_kernel, (cdiv(rows, block["OWN"] * block["GROUPS"]),),
            z, *prepared, *of_rows, *out, *sums, rows, columns, prepared[0].shape[0], first,
            0 if own else first, -start, total - start, dataset_size, z.stride(),
            WHOLE=not own, STRATIFIED=stratified, enable_fp_fusion=True, **block,
        )  # fmt: skip
    return sums if own else [*out, *sums]
