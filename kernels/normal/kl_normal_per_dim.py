"""The KL of every latent dimension, averaged over the batch: a column sum in one pass (2R, 4R with a prior).

The backward pass is kl_normal's, with one incoming value per column in place of one per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import bound, kl_terms, kl_terms_gradient, to_logvar
from fastkl.kernels._launch import Plan, Sums, planned, sums
from fastkl.kernels._layout import (
    View,
    cdiv,
    compute_dtype,
    expanded,
    is_bounded,
    layout,
    present,
    share_rows,
)
from fastkl.kernels._tile import run_of_rows, store_columns, tile
from fastkl.kernels.normal import kl_normal

# Rows that one program sums at least, while there are more: its partial sums are written and read again once for them.
MIN_ROWS = 64


@triton.jit
def kl_normal_per_dim_fwd_kernel(
    mu, parameter, prior_mu, prior_logvar, kl, shape, mu_strides, parameter_strides, prior_mu_strides,
    prior_logvar_strides, kl_strides, rows_per_program, column_blocks, partial_stride,
    low: tl.constexpr, high: tl.constexpr,
    SCALE: tl.constexpr, BOUNDED: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The share of the mean of a block of columns by `rows_per_program` rows, in kl, `partial_stride` apart for each
    group of rows."""
    rows, columns = shape[0], shape[2]
    first, last, group, block = run_of_rows(rows, rows_per_program, column_blocks)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = kl.dtype.element_ty
    total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        # The sum below leaves out masked elements, so any finite fill is valid; 1 is also a valid standard deviation.
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        m = tl.load(mu + tile(row, column, shape, mu_strides, NESTED), mask, other=1.0).to(dtype)
        v = tl.load(parameter + tile(row, column, shape, parameter_strides, NESTED), mask, other=1.0).to(dtype)
        logvar = bound(to_logvar(v, SCALE), low, high, BOUNDED)
        if prior_mu is None:
            terms = kl_terms(m, logvar, None, None)
        else:
            at = tile(row, column, shape, prior_mu_strides, NESTED)
            pm = tl.load(prior_mu + at, mask, other=1.0).to(dtype)
            at = tile(row, column, shape, prior_logvar_strides, NESTED)
            pv = tl.load(prior_logvar + at, mask, other=1.0).to(dtype)
            terms = kl_terms(m, logvar, pm, pv)
        total = tl.where(mask, total + terms, total)
    store_columns(kl, tl.sum(total, axis=0) / rows, column, shape, kl_strides, group, partial_stride, NESTED)


@planned
def plan_fwd(inputs: Sequence[View | None], event_ndim: int, scale: str, low: float, high: float) -> Sums | None:
    """(the launch, the shape of the groups' sums, their dtype); None for views that no two dimensions describe."""
    shape = present(inputs)[0].shape
    event = shape[len(shape) - event_ndim :]
    rows, columns = shape[: len(shape) - event_ndim].numel(), event.numel()
    inputs = expanded(inputs, shape)
    dtype, block = compute_dtype(inputs), kl_normal.blocks(rows, columns, present(inputs), tall=True)
    column_blocks = cdiv(columns, block["COLUMNS"])
    rows_per_program, groups = share_rows(rows, block["ROWS"], column_blocks, MIN_ROWS)
    found = layout([*inputs, View.dense(event, dtype).expand(shape)], event_ndim)
    if found is None:
        return None
    plan = Plan(
        kl_normal_per_dim_fwd_kernel, (groups * column_blocks,), found.shape, *found.strides, rows_per_program,
        column_blocks, columns, low, high, SCALE=scale, BOUNDED=is_bounded(low, high), NESTED=found.nested,
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, (groups, *event), dtype


def fwd(
    mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    event_ndim: int, scale: str, low: float, high: float, live: bool,
) -> Tensor:  # fmt: skip
    inputs = (mu, parameter, prior_mu, prior_logvar)
    if mu.numel() == 0:  # the mean of nothing
        return mu.new_full(mu.shape[mu.dim() - event_ndim :], float("nan"), dtype=compute_dtype(inputs))
    # Two stages, no atomics: the same sum in every run.
    return sums(plan_fwd, inputs, event_ndim, scale, low, high)


def bwd(
    dkl: Tensor, mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    dmu: Tensor, dparameter: Tensor, dprior_mu: Tensor | None, dprior_logvar: Tensor | None,
    event_ndim: int, scale: str, low: float, high: float, live: bool,
) -> None:  # fmt: skip
    weight = 1.0 / max(1, mu.shape[: mu.dim() - event_ndim].numel())
    if dkl.dtype == torch.float64:  # a kernel's float argument is a float32
        dkl, weight = dkl * weight, 1.0
    inputs, outputs = (dkl, mu, parameter, prior_mu, prior_logvar), (dmu, dparameter, dprior_mu, dprior_logvar)
    kl_normal.launch_bwd(inputs, outputs, weight, event_ndim, scale, low, high, live, kl_terms_gradient, True)
