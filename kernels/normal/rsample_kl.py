"""Reparameterised sampling, with or without the KL, in one pass: 2R + 1W forward, 3R + 2W backward (without: 2R + 2W).

The noise comes from Philox in registers. Backward draws it again from the 8-byte seed, so it is never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import (
    TRITON_DTYPE,
    bound,
    bound_gradient,
    exp,
    exp_to_half,
    kl_terms,
    kl_terms_gradient,
    standard_kl_terms,
    standard_kl_terms_gradient,
    to_logvar,
    to_parameter_gradient,
    weighted,
)
from fastkl.kernels._launch import Plan, planned
from fastkl.kernels._layout import (
    OLD_COMPILER,
    PROGRAMS,
    SPILLS_A_FEW,
    View,
    cdiv,
    clear,
    compute_dtype,
    contiguous,
    contiguous_strides,
    expanded,
    finish,
    is_bounded,
    layout,
    next_power_of_2,
    on_copies,
    present,
    registers,
    share,
    views,
)
from fastkl.kernels._noise import row_noise, shifted_columns
from fastkl.kernels._tile import elements, load_rows, run_of_columns, run_of_rows, store_columns
from fastkl.kernels._tuned import TILES

# Minimum rows per program for a prior shared by the batch, so that partial sums stay a small part of the traffic.
SHARED_ROWS = 32
# Elements of a tile whose rows cannot be read 16 bytes at a time.
ODD_TILE = {2: 512, 4: 512, 8: 256}


def blocks(rows: int, columns: int, tensors: list[torch.Tensor]) -> dict[str, int]:
    """A tile of rows x columns; its columns are a multiple of 4, one Philox call each."""
    itemsize = max(tensor.itemsize for tensor in tensors)
    tile, warps = TILES["rsample_kl"][itemsize]  # 32 bytes of each tensor for a thread: sampling needs registers, too
    tile = tile if columns % 16 == 0 else ODD_TILE[itemsize]
    tile = tile // 2 if len(tensors) > 2 else tile  # a prior takes as many registers again
    block_columns = min(max(4, next_power_of_2(columns)), tile)
    block_rows = min(tile // block_columns, next_power_of_2(rows))
    # By itself ptxas keeps to so few registers that it loads just before use, and spills a few in bfloat16.
    few = registers(112 if SPILLS_A_FEW else 104) if itemsize < 8 else {}
    return {"ROWS": block_rows, "COLUMNS": block_columns, "num_warps": warps, **few}


@triton.jit
def rsample_kl_fwd_kernel(
    mu, parameter, prior_mu, prior_logvar, noise, z, kl, seed, shape, mu_strides, parameter_strides, prior_mu_strides,
    prior_logvar_strides, noise_strides, z_strides, noise_sample_stride, z_sample_stride, samples, stream,
    columns_per_program, splits,
    low: tl.constexpr, high: tl.constexpr,
    SCALE: tl.constexpr, BOUNDED: tl.constexpr, SHIFT: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """z and kl [splits, rows] or None; noise is None or given. `splits` programs share a block of rows."""
    rows, columns = shape[0], shape[2]
    HALF: tl.constexpr = z.dtype.element_ty.primitive_bitwidth == 16
    last_column = columns + 3 if SHIFT else columns
    row, first, last, place = run_of_columns(last_column, columns_per_program, splits, rows, ROWS)
    if noise is None:
        key = tl.load(seed)
    if kl is not None:
        total = tl.zeros([ROWS, COLUMNS // 4], dtype=DTYPE)
    for start in range(first, last, COLUMNS):
        column = shifted_columns(row, start, columns, SHIFT, COLUMNS)
        # A masked element has mean 0 and log-variance 0 on both sides, so its KL is exactly 0, unless a clamp or
        # softplus changes the log-variance.
        mask = (row < rows)[:, None] & (column < columns)
        mask = mask & (column >= 0) if SHIFT else mask
        at = row[:, None]
        m = tl.load(mu + elements(at, column, shape, mu_strides, NESTED), mask, other=0.0).to(DTYPE)
        fill: tl.constexpr = 1.0 if SCALE == "std" else 0.0
        v = tl.load(parameter + elements(at, column, shape, parameter_strides, NESTED), mask, other=fill).to(DTYPE)
        logvar = bound(to_logvar(v, SCALE), low, high, BOUNDED)
        sigma = exp_to_half(logvar, 0.5) if HALF and kl is None else exp(logvar, 0.5)
        if kl is not None:
            if prior_mu is None:
                terms = standard_kl_terms(m, logvar, sigma * sigma)
            else:
                prior_at = elements(at, column, shape, prior_mu_strides, NESTED)
                pm = tl.load(prior_mu + prior_at, mask, other=0.0).to(DTYPE)
                prior_at = elements(at, column, shape, prior_logvar_strides, NESTED)
                pv = tl.load(prior_logvar + prior_at, mask, other=0.0).to(DTYPE)
                terms = kl_terms(m, logvar, pm, pv)
            terms = tl.where(mask, terms, 0.0) if BOUNDED or SCALE == "softplus" else terms
            total += tl.sum(terms.reshape(ROWS, COLUMNS // 4, 4), axis=2)  # within a thread, which saves registers
        given, drawn = noise, z
        for sample in range(samples):
            if noise is None:
                eps = row_noise(key, row, start, sample, stream, columns, ROWS, COLUMNS, HALF, SHIFT).to(DTYPE)
            else:
                eps = tl.load(given + elements(at, column, shape, noise_strides, NESTED), mask, other=0.0).to(DTYPE)
                given += noise_sample_stride
            tl.store(drawn + elements(at, column, shape, z_strides, NESTED), m + sigma * eps, mask)
            drawn += z_sample_stride
    if kl is not None:
        tl.store(kl + place, tl.sum(total, axis=1), mask=row < rows)


@triton.jit
def rsample_kl_bwd_kernel(
    dz, dkl, mu, parameter, prior_mu, prior_logvar, noise, dmu, dparameter, dprior_mu, dprior_logvar, seed,
    shape, dz_strides, dkl_strides, mu_strides, parameter_strides, prior_mu_strides, prior_logvar_strides,
    noise_strides, dmu_strides, dparameter_strides, dprior_mu_strides, dprior_logvar_strides, noise_sample_stride,
    dz_sample_stride, samples, stream, rows_per_program, column_blocks, partial_stride,
    low: tl.constexpr, high: tl.constexpr,
    SCALE: tl.constexpr, BOUNDED: tl.constexpr, LIVE: tl.constexpr, SHARED: tl.constexpr, SHIFT: tl.constexpr,
    NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of columns by `rows_per_program` rows; without a KL, dkl and mu are None. With SHARED the
    prior is one row, and dprior the program's partial sum, `partial_stride` apart."""
    rows, columns = shape[0], shape[2]
    HALF: tl.constexpr = dmu.dtype.element_ty.primitive_bitwidth + dparameter.dtype.element_ty.primitive_bitwidth == 32
    first, last, group, block = run_of_rows(rows, rows_per_program, column_blocks)
    start_column = block * COLUMNS
    if noise is None:
        key = tl.load(seed)
    if SHARED:
        total_mu = tl.zeros([ROWS, COLUMNS], dtype=DTYPE)
        total_logvar = tl.zeros([ROWS, COLUMNS], dtype=DTYPE)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None]
        column = shifted_columns(row, start_column, columns, SHIFT, COLUMNS)
        # Masked elements are neither stored nor summed; 1 is a valid mean, log-variance and standard deviation.
        mask = (row < rows)[:, None] & (column < columns)
        mask = mask & (column >= 0) if SHIFT else mask
        v = tl.load(parameter + elements(at, column, shape, parameter_strides, NESTED), mask, other=1.0).to(DTYPE)
        raw = to_logvar(v, SCALE)
        logvar = bound(raw, low, high, BOUNDED)
        sigma = exp_to_half(logvar, 0.5) if HALF else exp(logvar, 0.5)
        gradient_mu = tl.zeros([ROWS, COLUMNS], dtype=DTYPE)
        gradient_sigma = tl.zeros([ROWS, COLUMNS], dtype=DTYPE)
        given, incoming = noise, dz
        for sample in range(samples):
            if noise is None:
                eps = row_noise(key, row, start_column, sample, stream, columns, ROWS, COLUMNS, HALF, SHIFT).to(DTYPE)
            else:
                eps = tl.load(given + elements(at, column, shape, noise_strides, NESTED), mask, other=0.0).to(DTYPE)
                given += noise_sample_stride
            d = tl.load(incoming + elements(at, column, shape, dz_strides, NESTED), mask, other=0.0).to(DTYPE)
            incoming += dz_sample_stride
            gradient_mu += d
            gradient_sigma += d * eps
        gradient_logvar = 0.5 * weighted(gradient_sigma, sigma)
        if dkl is not None:
            weight = load_rows(dkl, row, shape, dkl_strides, NESTED)
            m = tl.load(mu + elements(at, column, shape, mu_strides, NESTED), mask, other=1.0).to(DTYPE)
            if prior_mu is None:
                kl_mu, kl_logvar = standard_kl_terms_gradient(m, logvar, sigma * sigma)
            else:
                prior_at = elements(at, column, shape, prior_mu_strides, NESTED)
                pm = tl.load(prior_mu + prior_at, mask, other=1.0).to(DTYPE)
                prior_at = elements(at, column, shape, prior_logvar_strides, NESTED)
                pv = tl.load(prior_logvar + prior_at, mask, other=1.0).to(DTYPE)
                kl_mu, kl_logvar, kl_pv = kl_terms_gradient(m, logvar, pm, pv)
                kl_pv = weighted(weight, kl_pv)
            kl_mu, kl_logvar = weighted(weight, kl_mu), weighted(weight, kl_logvar)
            if prior_mu is not None:
                if SHARED:
                    total_mu = tl.where(mask, total_mu - kl_mu, total_mu)
                    total_logvar = tl.where(mask, total_logvar + kl_pv, total_logvar)
                elif dprior_mu is not None:
                    out = elements(at, column, shape, dprior_mu_strides, NESTED)
                    tl.store(dprior_mu + out, -kl_mu, mask)
                    out = elements(at, column, shape, dprior_logvar_strides, NESTED)
                    tl.store(dprior_logvar + out, kl_pv, mask)
            gradient_mu += kl_mu
            gradient_logvar += kl_logvar
        gradient = to_parameter_gradient(gradient_logvar, v, SCALE)
        gradient = bound_gradient(gradient, raw, low, high, BOUNDED, LIVE)
        tl.store(dmu + elements(at, column, shape, dmu_strides, NESTED), gradient_mu, mask)
        tl.store(dparameter + elements(at, column, shape, dparameter_strides, NESTED), gradient, mask)
    if SHARED:
        column = start_column + tl.arange(0, COLUMNS)
        sums_mu, sums_logvar = tl.sum(total_mu, axis=0), tl.sum(total_logvar, axis=0)
        store_columns(dprior_mu, sums_mu, column, shape, dprior_mu_strides, group, partial_stride, NESTED)
        store_columns(dprior_logvar, sums_logvar, column, shape, dprior_logvar_strides, group, partial_stride, NESTED)


def first_sample(view: View | None, num_samples: int | None, like: View) -> tuple[View, int]:
    """(the first sample's view, the stride to the next); no strides if the tensor is missing."""
    if view is None or num_samples == 0:
        return View(like.shape, (0,) * like.dim(), like.dtype), 0
    if num_samples is None:
        return view, 0
    return View(view.shape[1:], view.strides[1:], view.dtype), view.strides[0]


def longest_event(views: list[View]) -> int:
    """How many dimensions to treat as columns when only samples are wanted, which need no event: as many as are
    contiguous, so that no Philox calls are wasted at the ends of short rows, but below 2^31 columns (32-bit counts)."""
    ndim = views[0].dim()
    for candidate in range(ndim, 0, -1):
        found = layout(views, candidate, reorder=False)
        if found is not None and found.nested < 2 and found.columns < 2**31:
            return candidate
    return min(1, ndim)


@planned
def plan_fwd(inputs, eps, z, event_ndim, scale, low, high, num_samples, stream, with_kl):
    """(the launch, kl's shape with the splits in front, its dtype); None for views that no two dimensions describe."""
    shape = inputs[0].shape
    inputs = expanded(inputs, shape)
    event_ndim = longest_event(present(inputs)) if event_ndim is None else event_ndim
    noise, noise_step = first_sample(eps, num_samples, inputs[0])
    drawn, drawn_step = first_sample(z, num_samples, inputs[0])
    found = layout([*inputs, noise, drawn], event_ndim, reorder=False)
    if found is None:
        return None
    dtype, block = compute_dtype(inputs), blocks(found.rows, found.columns, present(inputs))
    row_blocks = cdiv(found.rows, block["ROWS"])
    shift = found.columns % 4 != 0
    programs = PROGRAMS // max(1, row_blocks) if with_kl else found.columns
    columns_per_program, splits = share(found.columns + 3 * shift, block["COLUMNS"], programs)
    if not (with_kl or found.columns):
        row_blocks = 0
    plan = Plan(
        rsample_kl_fwd_kernel, (row_blocks * splits,), found.shape, *found.strides, noise_step, drawn_step,
        1 if num_samples is None else num_samples, stream, columns_per_program, splits, low, high,
        SCALE=scale, BOUNDED=is_bounded(low, high), SHIFT=shift, NESTED=found.nested, DTYPE=TRITON_DTYPE[dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, (splits, *shape[: len(shape) - event_ndim]), dtype


def launch_fwd(inputs, eps, seed, event_ndim, scale, low, high, num_samples, stream, *, with_kl):
    """(z, kl), or (z, None). Without a KL event_ndim may be None."""
    mu, parameter = inputs[:2]
    out_dtype = torch.promote_types(mu.dtype, parameter.dtype)
    if num_samples is None:
        z = torch.empty_like(mu, dtype=out_dtype)
    else:
        z = torch.empty((num_samples, *mu.shape), dtype=out_dtype, device=mu.device)
    settings = (event_ndim, scale, low, high, num_samples, stream)
    found = plan_fwd(views(*inputs), *views(eps, z), *settings, with_kl)
    if found is None:
        drawn, kl = launch_fwd(contiguous(*inputs), *contiguous(eps), seed, *settings, with_kl=with_kl)
        return z.copy_(drawn), kl
    plan, shape, dtype = found
    kl = torch.empty(shape[shape[0] == 1 :], dtype=dtype, device=mu.device) if with_kl else None
    plan.launch(*inputs, eps, z, kl, seed)
    return z, kl.sum(0) if with_kl and shape[0] > 1 else kl


def fwd(mu, parameter, prior_mu, prior_logvar, eps, seed, event_ndim, scale, low, high, live, num_samples, stream):
    inputs = (mu, parameter, prior_mu, prior_logvar)
    return launch_fwd(inputs, eps, seed, event_ndim, scale, low, high, num_samples, stream, with_kl=True)


def bwd(
    dz, dkl, mu, parameter, prior_mu, prior_logvar, eps, seed, dmu, dparameter, dprior_mu, dprior_logvar, *settings
) -> None:  # fmt: skip
    if dkl is None:  # not a KL gradient of zero, which would turn an infinite KL into NaN
        prior_mu = prior_logvar = None
    inputs, outputs = (dz, dkl, mu, parameter, prior_mu, prior_logvar, eps), (dmu, dparameter, dprior_mu, dprior_logvar)
    launch_bwd(inputs, outputs, seed, *settings)


@planned
def plan_bwd(inputs, outputs, event_ndim, scale, low, high, live, num_samples, stream):
    """(the launch, the shape of what a shared prior's gradients are summed from, over which dimensions), or None."""
    dz, dkl, *inputs, eps = inputs
    shape, dtype = inputs[0].shape, compute_dtype(inputs)
    shared = outputs[2] is not None and inputs[2].dim() < len(shape)
    inputs, outputs = expanded(inputs, shape), expanded(outputs, shape)
    incoming, incoming_step = first_sample(dz, num_samples, inputs[0])
    noise, noise_step = first_sample(eps, num_samples, inputs[0])
    event_ndim = longest_event([*present(inputs), incoming]) if event_ndim is None else event_ndim
    event = shape[len(shape) - event_ndim :]
    rows, columns = shape[: len(shape) - event_ndim].numel(), event.numel()
    block = blocks(rows, columns, present(inputs))
    shift = columns % 4 != 0
    if dtype == torch.float32 and ((num_samples or 1) > 1 or OLD_COMPILER):  # fewer would spill in bfloat16
        block |= registers(168)
    column_blocks = cdiv(columns + 3 * shift, block["COLUMNS"])
    partial, over, rows_per_program, groups = None, None, block["ROWS"], cdiv(rows, block["ROWS"])
    if shared and shift:  # shifted rows do not line up in columns, so this gradient is written whole first
        partial, over = (2, *shape), tuple(range(1, 1 + len(shape) - event_ndim))
        outputs[2:] = [View(shape, contiguous_strides(shape), dtype)] * 2
    elif shared:
        rows_per_program, groups = share(rows, block["ROWS"], min(PROGRAMS // column_blocks, cdiv(rows, SHARED_ROWS)))
        partial, over = (2, groups, *event), (1,)
        outputs[2:] = [View(event, contiguous_strides(event), dtype).expand(shape)] * 2
    of_kl = first_sample(None, None, inputs[0])[0] if dkl is None else dkl.of_rows(shape)
    found = layout([incoming, of_kl, *inputs, noise, *outputs], event_ndim, reorder=False)
    if found is None:
        return None
    plan = Plan(
        rsample_kl_bwd_kernel, (groups * column_blocks,), found.shape, *found.strides,
        noise_step, incoming_step, 1 if num_samples is None else num_samples, stream, rows_per_program, column_blocks,
        columns, low, high, SCALE=scale, BOUNDED=is_bounded(low, high), LIVE=live, SHARED=shared and not shift,
        SHIFT=shift, NESTED=found.nested, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, partial, over


def launch_bwd(inputs, outputs, seed, *settings) -> None:
    """The gradients `outputs` of q and, if they are not None, of the prior. inputs: dz, dkl with one value for each row
    (each may be None), those of the forward pass, and eps. Without a KL event_ndim, the first setting, may be None."""
    dz, dkl, mu, parameter, prior_mu, prior_logvar, eps = inputs
    if mu.numel() == 0:
        return clear(outputs)
    dtype = compute_dtype((mu, parameter, prior_mu, prior_logvar))
    dkl = None if dkl is None else dkl.to(dtype)
    inputs = (dz, dkl, *inputs[2:])
    found = plan_bwd(views(*inputs), views(*outputs), *settings)
    if found is None:
        return on_copies(lambda *copies: launch_bwd(*copies, seed, *settings), inputs, outputs)
    plan, shape, over = found
    totals = outputs[2:] if shape is None else torch.empty(shape, dtype=dtype, device=mu.device)
    plan.launch(
        mu.new_zeros(()) if dz is None else dz, dkl, None if dkl is None else mu, parameter, prior_mu, prior_logvar,
        eps, *outputs[:2], *totals, seed,
    )  # fmt: skip
    return None if shape is None else finish(outputs[2:], totals.sum(over))
