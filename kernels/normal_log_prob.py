"""ln N(x; mean, exp(logvar)) per sample: one pass forward (3R), one backward (3R + a W for each wanted gradient).

A log-variance that is constant in each row, or shared by the batch, is not counted above: it is read as it is, and its
gradient leaves the kernel as one partial sum per row, or per column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import exp, offsets, tile
from fastkl.kernels._layout import NO_STRIDES, cdiv, compute_dtype, finish, fit, next_power_of_2, share

# Programs that fill a large GPU several times over; fixed, so that the order of summation does not depend on the chip.
PROGRAMS = 1024
# Rows that one program sums at least where the batch shares logvar: its partial sums stay a small part of the traffic.
SHARED_ROWS = 32
# Bytes of tiles that one program reads, all tensors together: 128 in flight for each of its 128 threads.
TILE_BYTES = 16384
# Elements of a tile whose rows cannot be read 16 bytes at a time: every element then has an address and a mask.
ODD_TILE = 1024

LN_2PI = tl.constexpr(1.8378770664093453)


def blocks(rows: int, columns: int, element_bytes: int) -> dict[str, int]:
    """A tile of rows x columns: short rows packed many to a program, long rows in runs."""
    elements = TILE_BYTES // next_power_of_2(element_bytes) if columns % 16 == 0 else ODD_TILE
    block_columns = min(next_power_of_2(columns), elements)
    return {"ROWS": min(elements // block_columns, next_power_of_2(rows)), "COLUMNS": block_columns, "num_warps": 4}


def spread_of(logvar: torch.Tensor, x: torch.Tensor) -> str:
    """How logvar lies in x [*batch, *event]: "full", "row" ([*batch, 1, ..., 1]) or "shared" ([*event])."""
    if logvar.dim() < x.dim():
        return "shared"
    return "full" if logvar.shape == x.shape else "row"


@triton.jit
def load_logvar(logvar, row, column, shape, strides, mask, SPREAD: tl.constexpr, NESTED: tl.constexpr):
    """[ROWS, COLUMNS], [ROWS, 1] or [1, COLUMNS]. Masked values are 0, for a z of 0."""
    if SPREAD == "row":
        at = offsets(row, shape[1], strides[0], strides[1], NESTED % 2 == 1)
        return tl.load(logvar + at, row < shape[0], other=0.0)[:, None]
    if SPREAD == "shared":
        at = offsets(column, shape[3], strides[2], strides[3], NESTED >= 2)
        return tl.load(logvar + at, column < shape[2], other=0.0)[None, :]
    return tl.load(logvar + tile(row, column, shape, strides, NESTED), mask, other=0.0)


@triton.jit
def standardise(x, mean, precision_root):
    """z: a term of the sum is -1/2 (ln 2 pi + logvar + z^2). 1 / sigma^2 alone would overflow first."""
    return (x - mean) * precision_root


@triton.jit
def normal_terms_gradient(z, precision_root):
    """In mean, which is minus the one in x; in logvar it is (z^2 - 1) / 2, or the sum of that."""
    return z * precision_root


@triton.jit
def normal_log_prob_fwd_kernel(
    x, mean, logvar, log_prob, shape, strides, columns_per_program, splits,
    SPREAD: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`splits` programs share each block of rows; log_prob is [splits, rows]."""
    rows, columns = shape[0], shape[2]
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    first = split * columns_per_program
    last = tl.minimum(first + columns_per_program, columns)
    dtype: tl.constexpr = log_prob.dtype.element_ty
    log_prob += split.to(tl.int64) * rows + row
    if SPREAD == "row":
        v = load_logvar(logvar, row, row, shape, strides[2], None, SPREAD, NESTED).to(dtype)
        precision_root = exp(-0.5 * v)
    total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        # A masked element adds 0 to the total: its x, mean and logvar are 0.
        mask = (row < rows)[:, None] & (column < last)[None, :]
        if SPREAD != "row":
            v = load_logvar(logvar, row, column, shape, strides[2], mask, SPREAD, NESTED).to(dtype)
            precision_root = exp(-0.5 * v)
            total += v
        value = tl.load(x + tile(row, column, shape, strides[0], NESTED), mask, other=0.0).to(dtype)
        m = tl.load(mean + tile(row, column, shape, strides[1], NESTED), mask, other=0.0).to(dtype)
        z = standardise(value, m, precision_root)
        total += z * z
    constant = LN_2PI + tl.zeros([ROWS], dtype=dtype)
    if SPREAD == "row":
        constant += tl.sum(v, axis=1)  # [ROWS, 1]
    tl.store(log_prob, -0.5 * (tl.sum(total, axis=1) + (last - first) * constant), mask=row < rows)


@triton.jit
def normal_log_prob_bwd_kernel(
    dlog_prob, x, mean, logvar, dx, dmean, dlogvar, shape, strides, rows_per_program, columns_per_program, splits,
    SPREAD: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`rows_per_program` rows (ROWS, unless the batch shares logvar) by `columns_per_program` columns (COLUMNS, unless
    logvar has one value per row). A gradient that nobody wants is None; dlogvar is [splits, rows] with "row",
    [groups of rows, columns] with "shared"."""
    rows, columns = shape[0], shape[2]
    split, group = tl.program_id(0) % splits, tl.program_id(0) // splits
    row_first, column_first = group * rows_per_program, split * columns_per_program
    row_last = tl.minimum(row_first + rows_per_program, rows)
    column_last = tl.minimum(column_first + columns_per_program, columns)
    dtype: tl.constexpr = dlog_prob.dtype.element_ty
    row, column = row_first + tl.arange(0, ROWS), column_first + tl.arange(0, COLUMNS)
    if SPREAD != "full":
        v = load_logvar(logvar, row, column, shape, strides[3], None, SPREAD, NESTED).to(dtype)
        precision_root = exp(-0.5 * v)
        total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    if SPREAD != "shared":
        at = offsets(row, shape[1], strides[0][0], strides[0][1], NESTED % 2 == 1)
        d = tl.load(dlog_prob + at, row < rows, other=0.0)[:, None]
    for row_start in range(row_first, row_last, ROWS):
        for column_start in range(column_first, column_last, COLUMNS):
            if SPREAD == "shared":
                row = row_start + tl.arange(0, ROWS)
                at = offsets(row, shape[1], strides[0][0], strides[0][1], NESTED % 2 == 1)
                d = tl.load(dlog_prob + at, row < rows, other=0.0)[:, None]
            pass
