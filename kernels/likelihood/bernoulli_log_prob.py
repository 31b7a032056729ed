"""ln Bernoulli(x; sigmoid(logits)) per sample: one pass forward (2R), one backward (2R + 1W, 2R + 2W with dx)."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import exp, log1p, weighted
from fastkl.kernels._launch import Plan, Sums, planned, sums
from fastkl.kernels._layout import (
    PROGRAMS,
    View,
    cdiv,
    clear,
    compute_dtype,
    layout,
    on_copies,
    share,
    views,
)
from fastkl.kernels._tile import load_rows, run_of_columns, tile
from fastkl.kernels.likelihood._tiles import blocks


@triton.jit
def bernoulli_terms(logits, x):
    """x l - softplus(l) without overflow; above 0 it is (x - 1) l - softplus(-l), because x l - l cancels."""
    return weighted(tl.where(logits > 0.0, x - 1.0, x), logits) - log1p(exp(-tl.abs(logits)))


@triton.jit
def bernoulli_terms_gradient(logits, x):
    """Gradients: in logits x - sigmoid(l), with the same two cases; in x the logit."""
    u = exp(-tl.abs(logits))
    opposite = u / (1.0 + u)  # the probability of the less likely outcome
    return tl.where(logits > 0.0, x - 1.0 + opposite, x - opposite)


@triton.jit
def bernoulli_log_prob_fwd_kernel(
    logits, x, log_prob, shape, logits_strides, x_strides, columns_per_program, splits,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """log_prob [splits, rows]; `splits` programs share a block of rows."""
    rows, columns = shape[0], shape[2]
    row, first, last, place = run_of_columns(columns, columns_per_program, splits, rows, ROWS)
    dtype: tl.constexpr = log_prob.dtype.element_ty
    total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < last)[None, :]
        # With a logit of 1024 and x = 1 a masked element adds exactly 0: 1024 (1 - 1) - log1p(0).
        logit = tl.load(logits + tile(row, column, shape, logits_strides, NESTED), mask, other=1024.0).to(dtype)
        value = tl.load(x + tile(row, column, shape, x_strides, NESTED), mask, other=1.0).to(dtype)
        total += bernoulli_terms(logit, value)
    tl.store(log_prob + place, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def bernoulli_log_prob_bwd_kernel(
    dlog_prob, logits, x, dlogits, dx, shape, dlog_prob_strides, logits_strides, x_strides, dlogits_strides, dx_strides,
    column_blocks,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile. One that is not requested is None; the gradient in x does not need x."""
    rows, columns = shape[0], shape[2]
    row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    # Masked elements are not stored, so any fill is valid.
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    dtype: tl.constexpr = dlog_prob.dtype.element_ty
    d = load_rows(dlog_prob, row, shape, dlog_prob_strides, NESTED)
    logit = tl.load(logits + tile(row, column, shape, logits_strides, NESTED), mask, other=0.0).to(dtype)
    if dlogits is not None:
        value = tl.load(x + tile(row, column, shape, x_strides, NESTED), mask, other=0.0).to(dtype)
        gradient = d * bernoulli_terms_gradient(logit, value)
        tl.store(dlogits + tile(row, column, shape, dlogits_strides, NESTED), gradient, mask)
    if dx is not None:
        tl.store(dx + tile(row, column, shape, dx_strides, NESTED), weighted(d, logit), mask)


@planned
def plan_fwd(inputs: Sequence[View], event_ndim: int) -> Sums | None:
    """(the launch, the shape of the splits' sums, their dtype); None for views that no two dimensions describe."""
    shape, found = inputs[0].shape, layout(inputs, event_ndim)
    if found is None:
        return None
    block = blocks("bernoulli_log_prob", found.rows, found.columns, max(view.itemsize for view in inputs))
    row_blocks = cdiv(found.rows, block["ROWS"])
    columns_per_program, splits = share(found.columns, block["COLUMNS"], PROGRAMS // row_blocks)
    plan = Plan(
        bernoulli_log_prob_fwd_kernel, (row_blocks * splits,),
        found.shape, *found.strides, columns_per_program, splits, NESTED=found.nested, enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, (splits, *shape[: len(shape) - event_ndim]), compute_dtype(inputs)


def fwd(logits: Tensor, x: Tensor, event_ndim: int) -> Tensor:
    if logits.numel() == 0:
        return logits.new_zeros(logits.shape[: logits.dim() - event_ndim], dtype=compute_dtype([logits, x]))
    return sums(plan_fwd, (logits, x), event_ndim)


@planned
def plan_bwd(inputs: Sequence[View], outputs: Sequence[View | None], event_ndim: int) -> Plan | None:
    """The launch; None if the views need more than two dimensions per axis."""
    dlog_prob, *inputs = inputs
    found = layout([dlog_prob.of_rows(inputs[0].shape), *inputs, *outputs], event_ndim)
    if found is None:
        return None
    block = blocks("bernoulli_log_prob", found.rows, found.columns, max(view.itemsize for view in inputs))
    column_blocks = cdiv(found.columns, block["COLUMNS"])
    return Plan(
        bernoulli_log_prob_bwd_kernel, (cdiv(found.rows, block["ROWS"]) * column_blocks,), found.shape,
        *found.strides, column_blocks, NESTED=found.nested, enable_fp_fusion=True, **block,
    )  # fmt: skip


def bwd(
    dlog_prob: Tensor, logits: Tensor, x: Tensor, dlogits: Tensor | None, dx: Tensor | None, event_ndim: int
) -> None:
    """A gradient that is not wanted is None."""
    inputs, outputs = (dlog_prob.to(compute_dtype((logits, x))), logits, x), (dlogits, dx)
    if logits.numel() == 0:
        return clear(outputs)
    plan = plan_bwd(views(*inputs), views(*outputs), event_ndim)
    if plan is None:
        return on_copies(lambda given, wanted: bwd(*[*given, *wanted, event_ndim]), inputs, outputs)
    return plan.launch(*inputs, *outputs)
