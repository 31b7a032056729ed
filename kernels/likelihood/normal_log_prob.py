"""ln N(x; mean, exp(logvar)) per sample: one pass forward (3R), one backward (3R + a W for each wanted gradient).

A log-variance that is constant in each row, or shared by the batch, is not counted above: it is read as it is, and its
gradient leaves the kernel as one partial sum per row, or per column.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import standardise
from fastkl.kernels._launch import Plan, Sums, planned, sums
from fastkl.kernels._layout import (
    PROGRAMS,
    View,
    cdiv,
    clear,
    compute_dtype,
    finish,
    layout,
    on_copies,
    share,
    share_rows,
    views,
)
from fastkl.kernels._tile import load_rows, row_offsets, run_of_columns, store_columns, tile
from fastkl.kernels.likelihood._tiles import blocks

LN_2PI = tl.constexpr(1.8378770664093453)


def spread_of(logvar: View, x: View) -> str:
    """The layout of logvar in x [*batch, *event]: "full", "row" ([*batch, 1, ..., 1]) or "shared" ([*event])."""
    if logvar.dim() < x.dim():
        return "shared"
    return "full" if logvar.shape == x.shape else "row"


@triton.jit
def load_tile(pointer, row, column, shape, strides, NESTED: tl.constexpr):
    mask = (row < shape[0])[:, None] & (column < shape[2])[None, :]
    return tl.load(pointer + tile(row, column, shape, strides, NESTED), mask, other=0.0)


@triton.jit
def standardise_gradient(d, z, root):
    """d times the gradient of -1/2 (ln 2 pi + logvar + z^2) in mean, and twice that in logvar; in x it is minus that in
    mean. The weight d multiplies first, because z^2 may overflow when d z^2 does not; for a weight of 0, z itself may
    have overflowed."""
    z = tl.where(d == 0.0, 0.0, z)
    dz = d * z
    return dz * root * root, dz * z - d


@triton.jit
def normal_log_prob_fwd_kernel(
    x, mean, logvar, log_prob, shape, x_strides, mean_strides, logvar_strides, columns_per_program, splits,
    SPREAD: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """log_prob [splits, rows]; `splits` programs share a block of rows."""
    row, first, last, place = run_of_columns(shape[2], columns_per_program, splits, shape[0], ROWS)
    dtype: tl.constexpr = log_prob.dtype.element_ty
    if SPREAD == "row":
        row_logvar = load_rows(logvar, row, shape, logvar_strides, NESTED).to(dtype)
    total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        # A masked element adds 0, because its x, mean and logvar are 0.
        value = load_tile(x, row, column, shape, x_strides, NESTED).to(dtype)
        m = load_tile(mean, row, column, shape, mean_strides, NESTED).to(dtype)
        if SPREAD == "row":
            z, _ = standardise(value - m, row_logvar)
            total += tl.fma(z, z, 0.0)  # kept apart from the sum: fused with it, it spills on sm_90
        else:
            v = load_tile(logvar, row, column, shape, logvar_strides, NESTED).to(dtype)
            z, _ = standardise(value - m, v)
            total += v + z * z
    constant = tl.zeros([ROWS], dtype=dtype) + LN_2PI
    if SPREAD == "row":
        # Reloaded, because a value live across the loop would spill. The different `other=` keeps the compiler from
        # merging the loads.
        at = row_offsets(row, shape, logvar_strides, NESTED)
        constant += tl.load(logvar + at, row < shape[0], other=1.0).to(dtype)
    value = -0.5 * (tl.sum(total, axis=1) + (last - first) * constant)
    tl.store(log_prob + place, value, mask=row < shape[0])


@triton.jit
def store_tile(pointer, row, column, shape, strides, value, NESTED: tl.constexpr):
    mask = (row < shape[0])[:, None] & (column < shape[2])[None, :]
    tl.store(pointer + tile(row, column, shape, strides, NESTED), value, mask)


@triton.jit
def bwd_tile(
    x, mean, v, d, dx, dmean, row, column, shape, x_strides, mean_strides, dx_strides, dmean_strides,
    NESTED: tl.constexpr,
):  # fmt: skip
    """Store dx and dmean unless None, and return twice the gradient in logvar."""
    value = load_tile(x, row, column, shape, x_strides, NESTED).to(d.dtype)
    m = load_tile(mean, row, column, shape, mean_strides, NESTED).to(d.dtype)
    z, root = standardise(value - m, v)
    gradient, twice = standardise_gradient(d, z, root)
    if dx is not None:
        store_tile(dx, row, column, shape, dx_strides, -gradient, NESTED)
    if dmean is not None:
        store_tile(dmean, row, column, shape, dmean_strides, gradient, NESTED)
    return twice


@triton.jit
def normal_log_prob_bwd_kernel(
    dlog_prob, x, mean, logvar, dx, dmean, dlogvar, shape, dlog_prob_strides, x_strides, mean_strides, logvar_strides,
    dx_strides, dmean_strides, dlogvar_strides, rows_per_program, columns_per_program, splits,
    SPREAD: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients; one that is not requested is None. With "row" a program has a run of columns, and dlogvar is its
    partial sum [splits, rows]; with "shared" a run of rows, and dlogvar is [groups, columns]; otherwise one tile."""
    rows, columns = shape[0], shape[2]
    split, group = tl.program_id(0) % splits, tl.program_id(0) // splits
    row = group * rows_per_program + tl.arange(0, ROWS)
    column = split * columns_per_program + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = dlog_prob.dtype.element_ty
    if SPREAD == "full":
        d = load_rows(dlog_prob, row, shape, dlog_prob_strides, NESTED)
        v = load_tile(logvar, row, column, shape, logvar_strides, NESTED).to(dtype)
        twice = bwd_tile(
            x, mean, v, d, dx, dmean, row, column, shape, x_strides, mean_strides, dx_strides, dmean_strides, NESTED
        )  # fmt: skip
        if dlogvar is not None:
            store_tile(dlogvar, row, column, shape, dlogvar_strides, 0.5 * twice, NESTED)
    elif SPREAD == "row":
        d = load_rows(dlog_prob, row, shape, dlog_prob_strides, NESTED)
        v = load_rows(logvar, row, shape, logvar_strides, NESTED).to(dtype)
        total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
        first = split * columns_per_program
        for start in range(first, tl.minimum(first + columns_per_program, columns), COLUMNS):
            at = start + tl.arange(0, COLUMNS)
            twice = bwd_tile(
                x, mean, v, d, dx, dmean, row, at, shape, x_strides, mean_strides, dx_strides, dmean_strides, NESTED
            )  # fmt: skip
            total += tl.where((at < columns)[None, :], twice, 0.0)
        if dlogvar is not None:
            tl.store(dlogvar + split.to(tl.int64) * rows + row, 0.5 * tl.sum(total, axis=1), mask=row < rows)
    else:
        # A tile with a row stride of 0, for [1, COLUMNS] in bfloat16 crashes Triton 3.9 on sm_90.
        v = load_tile(logvar, row, column, shape, logvar_strides, NESTED).to(dtype)
        total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
        first = group * rows_per_program
        for start in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
            at = start + tl.arange(0, ROWS)
            d = load_rows(dlog_prob, at, shape, dlog_prob_strides, NESTED)  # 0 for rows past the end
            twice = bwd_tile(
                x, mean, v, d, dx, dmean, at, column, shape, x_strides, mean_strides, dx_strides, dmean_strides, NESTED
            )  # fmt: skip
            total += twice
        if dlogvar is not None:
            sums = 0.5 * tl.sum(total, axis=0)
            store_columns(dlogvar, sums, column, shape, dlogvar_strides, group, columns, NESTED)


@planned
def plan_fwd(inputs: Sequence[View], event_ndim: int) -> Sums | None:
    """(the launch, the shape of the splits' sums, their dtype); None for views that no two dimensions describe."""
    x, mean, logvar = inputs
    inputs, shape = [x, mean, logvar.expand(x.shape)], x.shape
    found = layout(inputs, event_ndim)
    if found is None:
        return None
    block = blocks("normal_log_prob", found.rows, found.columns, max(view.itemsize for view in inputs))
    row_blocks = cdiv(found.rows, block["ROWS"])
    columns_per_program, splits = share(found.columns, block["COLUMNS"], PROGRAMS // row_blocks)
    plan = Plan(
        normal_log_prob_fwd_kernel, (row_blocks * splits,),
        found.shape, *found.strides, columns_per_program, splits,
        SPREAD=spread_of(logvar, x), NESTED=found.nested, enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, (splits, *shape[: len(shape) - event_ndim]), compute_dtype(inputs)


def fwd(x: Tensor, mean: Tensor, logvar: Tensor, event_ndim: int) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros(x.shape[: x.dim() - event_ndim], dtype=compute_dtype([x, mean, logvar]))
    return sums(plan_fwd, (x, mean, logvar), event_ndim)


@planned
def plan_bwd(
    inputs: Sequence[View], outputs: Sequence[View | None], event_ndim: int
) -> tuple[Plan, tuple[int, ...] | None] | None:
    """(the launch, the shape of the partial sums of logvar's gradient, or None); None as in plan_fwd. Unwanted
    outputs are None."""
    dlog_prob, x, mean, logvar = inputs
    shape, spread, wanted = x.shape, spread_of(logvar, x), outputs[2] is not None
    event = shape[len(shape) - event_ndim :]
    rows, columns = shape[: len(shape) - event_ndim].numel(), event.numel()
    block = blocks("normal_log_prob", rows, columns, max(view.itemsize for view in (x, mean, logvar)))
    rows_per_program, columns_per_program = block["ROWS"], block["COLUMNS"]
    groups, splits, partial = cdiv(rows, rows_per_program), cdiv(columns, columns_per_program), None
    if wanted and spread == "row":
        columns_per_program, splits = share(columns, columns_per_program, PROGRAMS // groups)
        partial, outputs = (splits, rows), (*outputs[:2], None)
    elif wanted and spread == "shared":
        rows_per_program, groups = share_rows(rows, rows_per_program, splits)
        partial = (groups, *event)
        outputs = (*outputs[:2], View.dense(event, dlog_prob.dtype).expand(shape))
    found = layout([dlog_prob.of_rows(shape), x, mean, logvar.expand(shape), *outputs], event_ndim)
    if found is None:
        return None
    plan = Plan(
        normal_log_prob_bwd_kernel, (groups * splits,), found.shape, *found.strides, rows_per_program,
        columns_per_program, splits, SPREAD=spread, NESTED=found.nested, enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, partial


def bwd(
    dlog_prob: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, dx: Tensor | None, dmean: Tensor | None,
    dlogvar: Tensor | None, event_ndim: int,
) -> None:  # fmt: skip
    """A gradient that is not wanted is None."""
    inputs, outputs = (dlog_prob.to(compute_dtype((x, mean, logvar))), x, mean, logvar), (dx, dmean, dlogvar)
    if x.numel() == 0:
        return clear(outputs)
    found = plan_bwd(views(*inputs), views(*outputs), event_ndim)
    if found is None:
        return on_copies(lambda given, wanted: bwd(*[*given, *wanted, event_ndim]), inputs, outputs)
    plan, shape = found
    if shape is None:
        return plan.launch(*inputs, *outputs)
    partial = inputs[0].new_empty(shape)
    plan.launch(*inputs, dx, dmean, partial)
    return finish([dlogvar], [partial.sum(0).view(logvar.shape)])
