"""ln Bernoulli(x; sigmoid(logits)) per sample: one pass forward (2R), one backward (2R + 1W, 2R + 2W with dx)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import log1p, offsets, tile, weighted
from fastkl.kernels._launch import launch, replayed
from fastkl.kernels._layout import NO_STRIDES, PROGRAMS, cdiv, compute_dtype, finish, fit, next_power_of_2, share
from fastkl.kernels._tuned import TILES

# Where rows cannot be read 16 bytes at a time, every element has an address and a mask.
ODD_TILE = 1024


def blocks(rows: int, columns: int, itemsize: int) -> dict[str, int]:
    """A tile of rows x columns: short rows packed many to a program, long rows in runs."""
    # 16 for each of 128 threads: more of them cost registers, and with these the programs that fit in.
    elements, warps = TILES["bernoulli_log_prob"][itemsize]
    elements = elements if columns % 16 == 0 else ODD_TILE
    block_columns = min(next_power_of_2(columns), elements)
    return {"ROWS": min(elements // block_columns, next_power_of_2(rows)), "COLUMNS": block_columns, "num_warps": warps}


@triton.jit
def bernoulli_terms(logits, x):
    """x l - softplus(l) without overflow; above 0 it is (x - 1) l - softplus(-l), for x l - l cancels."""
    return weighted(tl.where(logits > 0.0, x - 1.0, x), logits) - log1p(tl.exp(-tl.abs(logits)))


@triton.jit
def bernoulli_terms_gradient(logits, x):
    """In logits x - sigmoid(l), in the same two parts; in x it is the logit."""
    u = tl.exp(-tl.abs(logits))
    opposite = u / (1.0 + u)  # the probability of what the logit's sign speaks against
    return tl.where(logits > 0.0, x - 1.0 + opposite, x - opposite)


@triton.jit
def bernoulli_log_prob_fwd_kernel(
    logits, x, log_prob, shape, logits_strides, x_strides, columns_per_program, splits,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`splits` programs share each block of rows; log_prob is [splits, rows]."""
    rows, columns = shape[0], shape[2]
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    first = split * columns_per_program
    last = tl.minimum(first + columns_per_program, columns)
    dtype: tl.constexpr = log_prob.dtype.element_ty
    log_prob += split.to(tl.int64) * rows + row
    total = tl.zeros([ROWS, COLUMNS], dtype=dtype)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < last)[None, :]
        # With a logit of 1024 and x = 1 a masked element adds exactly 0: 1024 (1 - 1) - log1p(0).
        logit = tl.load(logits + tile(row, column, shape, logits_strides, NESTED), mask, other=1024.0).to(dtype)
        value = tl.load(x + tile(row, column, shape, x_strides, NESTED), mask, other=1.0).to(dtype)
        total += bernoulli_terms(logit, value)
    tl.store(log_prob, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def bernoulli_log_prob_bwd_kernel(
    dlog_prob, logits, x, dlogits, dx, shape, dlog_prob_strides, logits_strides, x_strides, dlogits_strides, dx_strides,
    column_blocks,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile. A gradient that nobody wants is None, and x is not read for the one in x."""
    rows, columns = shape[0], shape[2]
    row = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    # What is masked is not stored; any fill will do.
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    dtype: tl.constexpr = dlog_prob.dtype.element_ty
    at = offsets(row, shape[1], dlog_prob_strides[0], dlog_prob_strides[1], NESTED % 2 == 1)
    d = tl.load(dlog_prob + at, row < rows, other=0.0)[:, None]
    logit = tl.load(logits + tile(row, column, shape, logits_strides, NESTED), mask, other=0.0).to(dtype)
    if dlogits is not None:
        value = tl.load(x + tile(row, column, shape, x_strides, NESTED), mask, other=0.0).to(dtype)
        gradient = d * bernoulli_terms_gradient(logit, value)
        tl.store(dlogits + tile(row, column, shape, dlogits_strides, NESTED), gradient, mask)
    if dx is not None:
        tl.store(dx + tile(row, column, shape, dx_strides, NESTED), weighted(d, logit), mask)


@replayed
def fwd(logits: torch.Tensor, x: torch.Tensor, event_ndim: int) -> torch.Tensor:
    batch = logits.shape[: logits.dim() - event_ndim]
    dtype = compute_dtype([logits, x])
    if logits.numel() == 0:
        return logits.new_zeros(batch, dtype=dtype)
    inputs, _, layout = fit([logits, x], [], event_ndim)
    block = blocks(layout.rows, layout.columns, max(logits.itemsize, x.itemsize))
    row_blocks = cdiv(layout.rows, block["ROWS"])
    columns_per_program, splits = share(layout.columns, block["COLUMNS"], PROGRAMS // row_blocks)
    log_prob = torch.empty(batch if splits == 1 else (splits, *batch), dtype=dtype, device=logits.device)
    launch(
        bernoulli_log_prob_fwd_kernel, (row_blocks * splits,),
        *inputs, log_prob, layout.shape, *layout.strides, columns_per_program, splits,
        NESTED=layout.nested, enable_fp_fusion=True, **block,
    )  # fmt: skip
    return log_prob if splits == 1 else log_prob.sum(0)


@replayed
def bwd(dlog_prob, logits, x, event_ndim: int, wanted: list[bool]) -> list[torch.Tensor]:
    """The wanted ones of (dlogits, dx)."""
    gradients = [torch.empty_like(tensor) for tensor, want in zip((logits, x), wanted) if want]
    if logits.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    d = dlog_prob.to(compute_dtype([logits, x])).reshape(*dlog_prob.shape, *[1] * event_ndim).expand(logits.shape)
    inputs, launched, layout = fit([d, logits, x], gradients, event_ndim)
    outputs, strides = iter(launched), iter(layout.strides[3:])
    block = blocks(layout.rows, layout.columns, max(logits.itemsize, x.itemsize))
    column_blocks = cdiv(layout.columns, block["COLUMNS"])
    launch(
        bernoulli_log_prob_bwd_kernel, (cdiv(layout.rows, block["ROWS"]) * column_blocks,),
        *inputs, *(next(outputs) if want else None for want in wanted),
        layout.shape, *layout.strides[:3], *(next(strides) if want else NO_STRIDES for want in wanted), column_blocks,
        NESTED=layout.nested, enable_fp_fusion=True, **block,
    )  # fmt: skip
    finish(gradients, launched)
    return gradients
