"""Gradients of total_correlation: one kernel by rows for z, one by posteriors for mu and logvar, without atomics.

Both take exponents relative to the forward pass's references, so that a single dominant posterior has a share of
exactly 1. The first kernel writes the values per (i, d) for the second: z, the references, the marginals' coefficients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import LN2
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, compute_dtype
from fastkl.kernels.pairs._total_correlation import (
    MOST_COLUMNS,
    bounded,
    column_index,
    other_index,
    over_columns,
    over_others,
    own_index,
    pad,
    pair_weight,
    prepare,
    references,
    tile,
)


@triton.jit
def weights_of(batch, dataset_size, DTYPE: tl.constexpr):
    """Of a row's own posterior and the next one, out of `batch` posteriors."""
    others = tl.sum(tl.full([1], 1.0, dtype=DTYPE), axis=0) * (batch - 1)
    return others / dataset_size, (dataset_size - others) / dataset_size


@triton.jit
def total_correlation_rows_kernel(
    z, means, roots, logs, own_means, own_roots, own_logs, dmutual, dtotal, ddimension, joint_sum, marginal_sum, dz,
    points, origins_out, coefficients, row_terms, rows, batch, columns, padded, padded_rows, first, first_own, head,
    end, dataset_size, z_strides, dmutual_stride, dtotal_stride, ddimension_stride, dz_strides,
    STRATIFIED: tl.constexpr, REGISTERS: tl.constexpr, OWN: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = means.dtype.element_ty
    COLUMNS: tl.constexpr = REGISTERS * STEPS
    ROWS: tl.constexpr = OWN * GROUPS
    index = tl.program_id(0) * ROWS + own_index(OWN, GROUPS)
    column = column_index(REGISTERS, STEPS)
    inside, real = index < rows, column < columns
    mask = inside & real
    # Rows past the end repeat the last one, and dimensions past the end have weight 0.
    row = tl.minimum(index, rows - 1)
    wide = row.to(tl.int64)
    x = tl.load(z + wide * z_strides[0] + column.to(tl.int64) * z_strides[1], real, other=0.0).to(dtype)
    own = first + row
    at_own = (first_own + row).to(tl.int64) * COLUMNS + column
    own_root = tl.load(own_roots + at_own)
    own_t = bounded((x - tl.load(own_means + at_own)) * own_root)
    origins, shift = bounded(own_t * own_t) - tl.load(own_logs + at_own), over_columns(x) * 0.0
    joint = tl.load(joint_sum + wide)
    far = joint < 0.0
    if tl.max(far.to(tl.int32)) > 0:
        origins, shift = references(x, origins, shift, far, means, roots, logs, padded, REGISTERS, LANES, STEPS)
    of_own = tl.load(dmutual + wide * dmutual_stride).to(dtype)
    of_total = tl.load(dtotal + wide * dtotal_stride).to(dtype)
    of_dimension = tl.load(ddimension + wide * ddimension_stride).to(dtype)
    # A row of weight 0 has gradient 0, even if it is infinitely far from all posteriors.
    of_joint, marginal = of_total - of_own, of_dimension - of_total
    of_joint = tl.where(of_joint == 0.0, 0.0, of_joint / tl.abs(joint))
    marginal_total = tl.load(marginal_sum + wide * columns + column, real, other=1.0)
    marginal = tl.where(real & (marginal != 0.0), marginal / marginal_total, 0.0)
    # Inputs of the other kernel.
    at = wide * COLUMNS + column
    kept = inside & (column < COLUMNS)
    tl.store(points + at, x, kept)
    tl.store(origins_out + at, origins, kept)
    tl.store(coefficients + at, marginal, kept)
    tl.store(row_terms + wide, shift, inside)
    tl.store(row_terms + padded_rows + wide, of_joint, inside)

    # Terms without a sum over posteriors belong to the block with the rows' own ones.
    if (first < 0) | (first >= batch):
        of_own, of_dimension = of_own * 0.0, of_dimension * 0.0
    own_weight, next_weight = weights_of(end - head, dataset_size, dtype)
    row_start = first + tl.program_id(0) * ROWS
    at = other_index(LANES) * COLUMNS + column
    total = (x + at) * 0.0
    for start in range(0, padded, LANES):
        s = tl.load(roots + at)
        t = bounded((x - tl.load(means + at)) * s)
        exponent = (origins + tl.load(logs + at)) - t * t
        means += LANES * COLUMNS
        roots += LANES * COLUMNS
        logs += LANES * COLUMNS
        weight = tl.exp2(over_columns(exponent) - shift) * of_joint + marginal * tl.exp2(exponent)
        if STRATIFIED:
            near = (start <= row_start + ROWS) & (start + LANES > row_start)
            if near | ((row_start + ROWS >= end) & (start == 0)):
                weight *= pair_weight(own, start + other_index(LANES), head, end, own_weight, next_weight)
        total += weight * t * s
    gradient = (over_others(total) + of_own * own_t * own_root) * (-2.0 * LN2) + of_dimension * x
    tl.store(dz + wide * dz_strides[0] + column.to(tl.int64) * dz_strides[1], gradient, mask)


@triton.jit
def total_correlation_posteriors_kernel(
    means, roots, logs, points, origins, coefficients, row_terms, dmutual, dmu, dlogvar, rows, batch, columns,
    padded_rows, first, head, end, dataset_size, dmutual_stride, dmu_strides, dlogvar_strides,
    STRATIFIED: tl.constexpr, REGISTERS: tl.constexpr, OWN: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = means.dtype.element_ty
    COLUMNS: tl.constexpr = REGISTERS * STEPS
    POSTERIORS: tl.constexpr = OWN * GROUPS
    start_own = tl.program_id(0) * POSTERIORS
    index = start_own + own_index(OWN, GROUPS)
    column = column_index(REGISTERS, STEPS)
    mask = (index < batch) & (column < columns)
    own = tl.minimum(index, batch - 1)
    at_own = own.to(tl.int64) * COLUMNS + column
    m, s, log = tl.load(means + at_own), tl.load(roots + at_own), tl.load(logs + at_own)
    own_weight, next_weight = weights_of(end - head, dataset_size, dtype)
    at = other_index(LANES) * COLUMNS + column
    count, mean_sum, square_sum = (m + at) * 0.0, (m + at) * 0.0, (m + at) * 0.0
    points_at = points
    for start in range(0, padded_rows, LANES):
        other = start + other_index(LANES)
        t = bounded((tl.load(points_at + at) - m) * s)
        exponent = (tl.load(origins + at) + log) - t * t
        coefficient = tl.load(coefficients + at)
        points_at += LANES * COLUMNS
        origins += LANES * COLUMNS
        coefficients += LANES * COLUMNS
        product = tl.exp2(over_columns(exponent) - tl.load(row_terms + other))
        product *= tl.load(row_terms + padded_rows + other)
        weight = product + coefficient * tl.exp2(exponent)
        if STRATIFIED:
            near = (start + first <= start_own + POSTERIORS) & (start + first + LANES >= start_own)
            if near | ((start_own == 0) & (start + first + LANES >= end)):
                weight *= pair_weight(first + other, own, head, end, own_weight, next_weight)
        count += weight
        moment = weight * t
        mean_sum += moment
        square_sum += moment * t
    # The own sample's direct term, ln q(z|x).
    sample = own - first
    mine = (sample >= 0) & (sample < rows)
    sample = tl.where(mine, sample, 0)
    of_own = tl.load(dmutual + sample.to(tl.int64) * dmutual_stride, mine, other=0.0).to(dtype)
    t = bounded((tl.load(points + sample.to(tl.int64) * COLUMNS + column) - m) * s)
    mean_total = over_others(mean_sum) + of_own * t
    square_total = (over_others(square_sum) + of_own * t * t) * LN2 - 0.5 * (over_others(count) + of_own)
    wide, narrow = own.to(tl.int64), column.to(tl.int64)
    tl.store(dmu + wide * dmu_strides[0] + narrow * dmu_strides[1], s * mean_total * (2.0 * LN2), mask)
    tl.store(dlogvar + wide * dlogvar_strides[0] + narrow * dlogvar_strides[1], square_total, mask)


def bwd(
    dmutual: Tensor, dtotal: Tensor, ddimension: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, joint_sum: Tensor,
    marginal_sum: Tensor, dz: Tensor, dmu: Tensor, dlogvar: Tensor, first: int, dataset_size: int, stratified: bool,
) -> None:  # fmt: skip
    given, sums, gradients = (dmutual, dtotal, ddimension), (joint_sum, marginal_sum), (dz, dmu, dlogvar)
    settings = (first, dataset_size, stratified, 0, mu.shape[0])
    return _backward(given, (z, mu, logvar), None, sums, gradients, *settings)


def block_bwd(
    dmutual: Tensor, dtotal: Tensor, ddimension: Tensor, z: Tensor, own_mu: Tensor, own_logvar: Tensor, mu: Tensor,
    logvar: Tensor, joint_sum: Tensor, marginal_sum: Tensor, dz: Tensor, dmu: Tensor, dlogvar: Tensor, *settings: int,
) -> None:  # fmt: skip
    """A block's part of dz, and the rows' part of the gradients of its posteriors; the sums are those of all blocks."""
    given, sums, gradients = (dmutual, dtotal, ddimension), (joint_sum, marginal_sum), (dz, dmu, dlogvar)
    return _backward(given, (z, mu, logvar), (own_mu, own_logvar), sums, gradients, *settings)


def _backward(given, inputs, own, sums, gradients, first, dataset_size, stratified, start, total) -> None:
    (dmutual, dtotal, ddimension), (z, mu, logvar), (dz, dmu, dlogvar) = given, inputs, gradients
    (rows, columns), batch = z.shape, mu.shape[0]
    if columns > MOST_COLUMNS:
        return NotImplemented
    dtype = compute_dtype([z, mu, logvar])
    if rows == 0 or columns == 0:
        for output in (dz, dmu, dlogvar):
            output.zero_()
        return None
    # A hook on saved tensors may lay out anew what was kept.
    joint_sum, marginal_sum = (tensor.contiguous() for tensor in sums)
    prepared = prepare(mu, logvar, dtype)
    of_rows = prepare(own[0], own[1], dtype) if own else prepared
    place = (-start, total - start, dataset_size)
    padded, width = prepared[0].shape
    padded_rows = cdiv(rows, pad(rows)) * pad(rows)
    kept = torch.empty((3, padded_rows, width), dtype=dtype, device=z.device)
    row_terms = torch.empty((2, padded_rows), dtype=dtype, device=z.device)
    if padded_rows > rows:  # rows of the padding have no weight: their coefficients are 0, and 2^-inf is
        kept[:, rows:] = 0.0
        row_terms[0, rows:] = float("inf")
        row_terms[1, rows:] = 0.0
    between = (*kept, row_terms)
    block = tile(columns, rows, batch, dtype)
    launch(
        total_correlation_rows_kernel, (cdiv(rows, block["OWN"] * block["GROUPS"]),),
        z, *prepared, *of_rows, *given, joint_sum, marginal_sum, dz, *between, rows, batch, columns, padded,
        padded_rows, first, 0 if own else first, *place, z.stride(), dmutual.stride(0), dtotal.stride(0),
        ddimension.stride(0), dz.stride(), STRATIFIED=stratified, enable_fp_fusion=True, **block,
    )  # fmt: skip
    block = tile(columns, batch, rows, dtype)
    launch(
        total_correlation_posteriors_kernel, (cdiv(batch, block["OWN"] * block["GROUPS"]),),
        *prepared, *between, dmutual, dmu, dlogvar, rows, batch, columns, padded_rows, first, *place,
        dmutual.stride(0), dmu.stride(), dlogvar.stride(), STRATIFIED=stratified, enable_fp_fusion=True, **block,
    )  # fmt: skip
    return None
