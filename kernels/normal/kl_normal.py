"""KL(q || p) of diagonal Gaussians: one pass forward (2R, 4R with a prior), one backward (2R + 2W, 4R + 4W)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import (
    bound,
    bound_gradient,
    kl_terms,
    kl_terms_gradient,
    to_logvar,
    to_parameter_gradient,
    weighted,
)
from fastkl.kernels._launch import Plan, Sums, planned, sums
from fastkl.kernels._layout import (
    PROGRAMS,
    SPILLS_A_FEW,
    View,
    cdiv,
    clear,
    compute_dtype,
    expanded,
    finish,
    is_bounded,
    layout,
    next_power_of_2,
    on_copies,
    present,
    registers,
    share,
    share_rows,
    views,
)
from fastkl.kernels._tile import column_offsets, load_rows, run_of_columns, run_of_rows, store_columns, tile
from fastkl.kernels._tuned import TILES

# Bytes of a row of a tall tile: whole cache lines, and narrow, so that many programs share the columns, few the rows.
TALL_ROW_BYTES = 256
# Elements of a tile whose rows cannot be read 16 bytes at a time: every element then has an address and a mask, which
# cost registers; float64 has half as many.
ODD_TILE = {2: 1024, 4: 1024, 8: 256}


def blocks(rows: int, columns: int, tensors: Sequence[View], *, tall: bool = False) -> dict[str, int]:
    """A tile of rows x columns: short rows packed many to a program, long rows in runs; `tall` for sums over rows."""
    itemsize = max(tensor.itemsize for tensor in tensors)
    # 64 to 128 bytes of all tensors for each thread; less in float64, whose exponential takes many registers.
    tile, warps = TILES["kl_normal_per_dim" if tall else "kl_normal"][itemsize]
    tile = 2 * tile // next_power_of_2(len(tensors)) if columns % 16 == 0 else ODD_TILE[itemsize]
    tile = max(tile, 2048) if itemsize == 2 and columns % 16 == 0 and not tall else tile  # 16 bytes for 256 lanes
    block_columns = min(next_power_of_2(columns), TALL_ROW_BYTES // itemsize if tall else tile)
    block_rows = min(next_power_of_2(rows), tile // block_columns)
    held = registers(168) if SPILLS_A_FEW else {}
    return {
        "ROWS": block_rows,
        "COLUMNS": min(next_power_of_2(columns), tile // block_rows),
        "num_warps": warps,
        **held,
    }


@triton.jit
def kl_normal_fwd_kernel(
    mu, parameter, prior_mu, prior_logvar, kl, shape, mu_strides, parameter_strides, prior_mu_strides,
    prior_logvar_strides, columns_per_program, splits,
    low: tl.constexpr, high: tl.constexpr,
    terms: tl.constexpr, SCALE: tl.constexpr, BOUNDED: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """kl [splits, rows], the sums of `terms`: kl_terms or another distance. `splits` programs share a block of rows."""
    rows, columns = shape[0], shape[2]
    row, first, last, place = run_of_columns(columns, columns_per_program, splits, rows, ROWS)
    dtype: tl.constexpr = kl.dtype.element_ty
    total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        # A masked element has mean 0 and log-variance 0 on both sides, so its term is exactly 0, unless a clamp or
        # softplus changes the log-variance.
        mask = (row < rows)[:, None] & (column < last)[None, :]
        m = tl.load(mu + tile(row, column, shape, mu_strides, NESTED), mask, other=0.0).to(dtype)
        fill: tl.constexpr = 1.0 if SCALE == "std" or SCALE == "std_or_0" else 0.0
        v = tl.load(parameter + tile(row, column, shape, parameter_strides, NESTED), mask, other=fill).to(dtype)
        logvar = bound(to_logvar(v, SCALE), low, high, BOUNDED)
        if prior_mu is None:
            value = terms(m, logvar, None, None)
        else:
            at = tile(row, column, shape, prior_mu_strides, NESTED)
            pm = tl.load(prior_mu + at, mask, other=0.0).to(dtype)
            at = tile(row, column, shape, prior_logvar_strides, NESTED)
            pv = tl.load(prior_logvar + at, mask, other=0.0).to(dtype)
            value = terms(m, logvar, pm, pv)
        if BOUNDED or SCALE == "softplus":
            value = tl.where(mask, value, 0.0)
        total += value
    tl.store(kl + place, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def kl_normal_bwd_kernel(
    dkl, mu, parameter, prior_mu, prior_logvar, dmu, dparameter, dprior_mu, dprior_logvar,
    shape, dkl_strides, mu_strides, parameter_strides, prior_mu_strides, prior_logvar_strides, dmu_strides,
    dparameter_strides, dprior_mu_strides, dprior_logvar_strides, weight, rows_per_program, column_blocks,
    partial_stride,
    low: tl.constexpr, high: tl.constexpr,
    terms_gradient: tl.constexpr, SCALE: tl.constexpr, BOUNDED: tl.constexpr, LIVE: tl.constexpr,
    SHARED: tl.constexpr, PER_COLUMN: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of columns by `rows_per_program` rows. dkl has one value per row, with PER_COLUMN one per
    column. With SHARED the prior is one row, and dprior the program's partial sum, `partial_stride` apart."""
    rows, columns = shape[0], shape[2]
    first, last, group, block = run_of_rows(rows, rows_per_program, column_blocks)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = dkl.dtype.element_ty
    if SHARED:
        total_mu = tl.zeros([ROWS, COLUMNS], dtype=dtype)
        total_logvar = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        # Masked elements are neither stored nor summed; 1 is a valid mean, log-variance and standard deviation.
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        if PER_COLUMN:
            at = column_offsets(column, shape, dkl_strides, NESTED)
            d = tl.load(dkl + at, column < columns, other=0.0)[None, :] * tl.where(row < rows, weight, 0.0)[:, None]
        else:
            d = load_rows(dkl, row, shape, dkl_strides, NESTED) * weight
        m = tl.load(mu + tile(row, column, shape, mu_strides, NESTED), mask, other=1.0).to(dtype)
        v = tl.load(parameter + tile(row, column, shape, parameter_strides, NESTED), mask, other=1.0).to(dtype)
        raw = to_logvar(v, SCALE)
        logvar = bound(raw, low, high, BOUNDED)
        if prior_mu is None:
            gradient_mu, gradient_logvar, _ = terms_gradient(m, logvar, None, None)
        else:
            at = tile(row, column, shape, prior_mu_strides, NESTED)
            pm = tl.load(prior_mu + at, mask, other=1.0).to(dtype)
            at = tile(row, column, shape, prior_logvar_strides, NESTED)
            pv = tl.load(prior_logvar + at, mask, other=1.0).to(dtype)
            gradient_mu, gradient_logvar, gradient_pv = terms_gradient(m, logvar, pm, pv)
            if SHARED:
                total_mu -= weighted(d, gradient_mu)  # 0 in masked rows, because d is 0
                total_logvar += weighted(d, gradient_pv)
            elif dprior_mu is not None:
                at = tile(row, column, shape, dprior_mu_strides, NESTED)
                tl.store(dprior_mu + at, -weighted(d, gradient_mu), mask)
                at = tile(row, column, shape, dprior_logvar_strides, NESTED)
                tl.store(dprior_logvar + at, weighted(d, gradient_pv), mask)
        gradient = to_parameter_gradient(weighted(d, gradient_logvar), v, SCALE)
        gradient = bound_gradient(gradient, raw, low, high, BOUNDED, LIVE)
        tl.store(dmu + tile(row, column, shape, dmu_strides, NESTED), weighted(d, gradient_mu), mask)
        tl.store(dparameter + tile(row, column, shape, dparameter_strides, NESTED), gradient, mask)
    if SHARED:
        sums_mu, sums_logvar = tl.sum(total_mu, axis=0), tl.sum(total_logvar, axis=0)
        store_columns(dprior_mu, sums_mu, column, shape, dprior_mu_strides, group, partial_stride, NESTED)
        store_columns(dprior_logvar, sums_logvar, column, shape, dprior_logvar_strides, group, partial_stride, NESTED)


@planned
def plan_fwd(
    inputs: Sequence[View | None], event_ndim: int, scale: str, low: float, high: float, terms: Any
) -> Sums | None:
    """(the launch, kl's shape with the splits in front, its dtype); None for views that no two dimensions describe."""
    shape = present(inputs)[0].shape
    inputs = expanded(inputs, shape)
    found = layout(inputs, event_ndim)
    if found is None:
        return None
    block = blocks(found.rows, found.columns, present(inputs))
    row_blocks = cdiv(found.rows, block["ROWS"])
    columns_per_program, splits = share(found.columns, block["COLUMNS"], PROGRAMS // max(1, row_blocks))
    plan = Plan(
        kl_normal_fwd_kernel, (row_blocks * splits,), found.shape, *found.strides, columns_per_program, splits,
        low, high, terms=terms, SCALE=scale, BOUNDED=is_bounded(low, high), NESTED=found.nested,
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, (splits, *shape[: len(shape) - event_ndim]), compute_dtype(inputs)


def fwd(
    mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    event_ndim: int, scale: str, low: float, high: float, live: bool, terms: Any = kl_terms,
) -> Tensor:  # fmt: skip
    inputs = (mu, parameter, prior_mu, prior_logvar)
    return sums(plan_fwd, inputs, event_ndim, scale, low, high, terms)


def bwd(
    dkl: Tensor, mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    dmu: Tensor, dparameter: Tensor, dprior_mu: Tensor | None, dprior_logvar: Tensor | None,
    event_ndim: int, scale: str, low: float, high: float, live: bool, terms_gradient: Any = kl_terms_gradient,
) -> None:  # fmt: skip
    inputs, outputs = (dkl, mu, parameter, prior_mu, prior_logvar), (dmu, dparameter, dprior_mu, dprior_logvar)
    launch_bwd(inputs, outputs, 1.0, event_ndim, scale, low, high, live, terms_gradient, False)


@planned
def plan_bwd(
    inputs: Sequence[Any], outputs: Sequence[View | None], weight: float, event_ndim: int, scale: str, low: float,
    high: float, live: bool, terms_gradient: Any, per_column: bool,
) -> tuple[Plan, int] | None:  # fmt: skip
    """(the launch, how many partial sums there are of a shared prior's gradient, or 0), or None as plan_fwd."""
    dkl, *inputs = inputs
    shape, dtype = inputs[0].shape, compute_dtype(inputs)
    event = shape[len(shape) - event_ndim :]
    rows, columns = shape[: len(shape) - event_ndim].numel(), event.numel()
    shared = outputs[2] is not None and inputs[2].dim() < len(shape)
    inputs, outputs = expanded(inputs, shape), expanded(outputs, shape)
    # Where both dkl and the prior vary along columns, their registers halve the tile.
    given = present(inputs)
    block = blocks(rows, columns, given * 2 if shared and per_column else given, tall=shared or per_column)
    column_blocks = cdiv(columns, block["COLUMNS"])
    rows_per_program, groups = block["ROWS"], cdiv(rows, block["ROWS"])
    if shared:
        rows_per_program, groups = share_rows(rows, block["ROWS"], column_blocks)
        outputs[2:] = [View.dense(event, dtype).expand(shape)] * 2
    found = layout([dkl.expand(shape) if per_column else dkl.of_rows(shape), *inputs, *outputs], event_ndim)
    if found is None:
        return None
    plan = Plan(
        kl_normal_bwd_kernel, (groups * column_blocks,), found.shape, *found.strides,
        weight, rows_per_program, column_blocks, 2 * columns, low, high,
        terms_gradient=terms_gradient, SCALE=scale, BOUNDED=is_bounded(low, high), LIVE=live, SHARED=shared,
        PER_COLUMN=per_column, NESTED=found.nested, enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, groups if shared else 0


def launch_bwd(
    inputs: Sequence[Any], outputs: Sequence[Tensor | None], weight: float, event_ndim: int, *settings: Any
) -> None:
    """The gradients `outputs` of q and, if they are not None, of the prior. inputs: dkl, which has one value for each
    row, or (the last setting) for each column, and those of the forward pass."""
    dkl, mu, *rest = inputs
    if mu.numel() == 0:
        return clear(outputs)
    inputs = (dkl.to(compute_dtype((mu, *rest))), mu, *rest)
    found = plan_bwd(views(*inputs), views(*outputs), weight, event_ndim, *settings)
    if found is None:
        return on_copies(lambda *copies: launch_bwd(*copies, weight, event_ndim, *settings), inputs, outputs)
    plan, groups = found
    if not groups:
        return plan.launch(*inputs, *outputs)
    partial = mu.new_empty((groups, 2, *mu.shape[mu.dim() - event_ndim :]), dtype=inputs[0].dtype)
    plan.launch(*inputs, *outputs[:2], *partial[0])
    return finish(outputs[2:], partial.sum(0))
