"""Reparameterised sampling, with or without the KL, in one pass: 2R + 1W forward, 3R + 2W backward (without: 2R + 2W).

The noise is Philox in registers: backward draws it again from the 8-byte seed, nothing is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import (
    POSTERIOR,
    TRITON_DTYPE,
    bound,
    bound_gradient,
    elements,
    exp,
    exp_to_half,
    kl_terms,
    kl_terms_gradient,
    kl_terms_prior,
    kl_terms_prior_gradient,
    normals,
    offsets,
    to_logvar,
    to_parameter_gradient,
    weighted,
)
from fastkl.kernels._launch import launch, replayed
from fastkl.kernels._layout import (
    NO_STRIDES,
    OLD_COMPILER,
    PROGRAMS,
    SPILLS_A_FEW,
    cdiv,
    compute_dtype,
    finish,
    is_bounded,
    layout,
    next_power_of_2,
    registers,
    share,
    unpack,
)
from fastkl.kernels._tuned import TILES

# Rows that one program sums at least, for a prior that the batch shares: partial sums stay a small part of the traffic.
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
def shifted_columns(row, start, columns, SHIFT: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS or 1, COLUMNS]: columns from `start`, moved left so that each row's first element begins a Philox call.

    A row of D elements begins at element row * D of the noise, which is the middle of a call unless 4 divides D.
    """
    column = start + tl.arange(0, COLUMNS)[None, :]
    if SHIFT:
        column -= ((row.to(tl.int64) * columns) & 3).to(tl.int32)[:, None]
    return column


@triton.jit
def row_noise(
    seed, row, start, sample, stream, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The noise of the elements that `shifted_columns` gives; `start` is a multiple of 4."""
    first = row.to(tl.int64)[:, None] * columns + start
    WIDE: tl.constexpr = HALF and not SHIFT  # shifted rows are written an element at a time
    return normals(seed, first >> 2, sample, stream, ROWS, COLUMNS, HALF, WIDE)


@triton.jit
def rsample_kl_fwd_kernel(
    mu, parameter, prior_mu, prior_logvar, noise, z, kl, seed, shape, mu_strides, parameter_strides, prior_mu_strides,
    prior_logvar_strides, noise_strides, z_strides, noise_sample_stride, z_sample_stride, samples, stream,
    columns_per_program, splits,
    low: tl.constexpr, high: tl.constexpr,
    SCALE: tl.constexpr, BOUNDED: tl.constexpr, SHIFT: tl.constexpr, NESTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`splits` programs share each block of rows; kl is [splits, rows] or None, noise is None or the caller's own."""
    rows, columns = shape[0], shape[2]
    HALF: tl.constexpr = z.dtype.element_ty.primitive_bitwidth == 16
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    first = split * columns_per_program
    last = tl.minimum(first + columns_per_program, columns + 3 if SHIFT else columns)
    if noise is None:
        key = tl.load(seed)
    if kl is not None:
        kl += split.to(tl.int64) * rows + row
        total = tl.zeros([ROWS, COLUMNS // 4], dtype=DTYPE)
    for start in range(first, last, COLUMNS):
        column = shifted_columns(row, start, columns, SHIFT, COLUMNS)
        # A masked element has mean 0 and log-variance 0 on both sides: its KL is 0 exactly, unless a clamp or softplus
        # makes another log-variance of it.
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
                terms = kl_terms(m, logvar, sigma * sigma)
            else:
                prior_at = elements(at, column, shape, prior_mu_strides, NESTED)
                pm = tl.load(prior_mu + prior_at, mask, other=0.0).to(DTYPE)
                prior_at = elements(at, column, shape, prior_logvar_strides, NESTED)
                pv = tl.load(prior_logvar + prior_at, mask, other=0.0).to(DTYPE)
                terms = kl_terms_prior(m, logvar, pm, pv)
            terms = tl.where(mask, terms, 0.0) if BOUNDED or SCALE == "softplus" else terms
            total += tl.sum(terms.reshape(ROWS, COLUMNS // 4, 4), axis=2)  # in one thread: a register for four
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
        tl.store(kl, tl.sum(total, axis=1), mask=row < rows)


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
    """One block of columns by `rows_per_program` rows; without a KL, dkl and mu are None. With SHARED the prior is one
    row, and dprior this program's partial sum over its rows, `partial_stride` apart."""
    rows, columns = shape[0], shape[2]
    HALF: tl.constexpr = dmu.dtype.element_ty.primitive_bitwidth + dparameter.dtype.element_ty.primitive_bitwidth == 32
    group = tl.program_id(0) // column_blocks
    start_column = tl.program_id(0) % column_blocks * COLUMNS
    first = group * rows_per_program
    if noise is None:
        key = tl.load(seed)
    if SHARED:
        total_mu = tl.zeros([ROWS, COLUMNS], dtype=DTYPE)
        total_logvar = tl.zeros([ROWS, COLUMNS], dtype=DTYPE)
    for start in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
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
            row_at = offsets(row, shape[1], dkl_strides[0], dkl_strides[1], NESTED % 2 == 1)
            weight = tl.load(dkl + row_at, row < rows, other=0.0)[:, None]
            m = tl.load(mu + elements(at, column, shape, mu_strides, NESTED), mask, other=1.0).to(DTYPE)
            if prior_mu is None:
                kl_mu, kl_logvar = kl_terms_gradient(m, logvar, sigma * sigma)
            else:
                prior_at = elements(at, column, shape, prior_mu_strides, NESTED)
                pm = tl.load(prior_mu + prior_at, mask, other=1.0).to(DTYPE)
                prior_at = elements(at, column, shape, prior_logvar_strides, NESTED)
                pv = tl.load(prior_logvar + prior_at, mask, other=1.0).to(DTYPE)
                kl_mu, kl_logvar, kl_pv = kl_terms_prior_gradient(m, logvar, pm, pv)
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
        at_column = offsets(column, shape[3], dprior_mu_strides[2], dprior_mu_strides[3], NESTED >= 2)
        at_column += group.to(tl.int64) * partial_stride
        tl.store(dprior_mu + at_column, tl.sum(total_mu, axis=0), mask=column < columns)
        tl.store(dprior_logvar + at_column, tl.sum(total_logvar, axis=0), mask=column < columns)


def with_samples(tensor, num_samples):
    """[samples, ...], whether or not there is a dimension of samples."""
    return tensor if tensor is None or num_samples is not None else tensor.unsqueeze(0)


def first(tensor, like):
    """The first sample; a stand-in without strides where there is none."""
    return like.new_empty(()).expand(like.shape) if tensor is None or tensor.shape[0] == 0 else tensor[0]


def sample_strides(*tensors):
    return tuple(0 if tensor is None else tensor.stride(0) for tensor in tensors)


@replayed
def fwd(q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live):
    settings = (scale, low, high, live)
    return launch_fwd(q, seed, eps, num_samples, packed_dim, prior, event_ndim, settings, with_kl=True)


@replayed
def bwd(dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient):
    mu = unpack(q, packed_dim)[0]
    settings = (scale, low, high, live)
    if dkl is None:  # not a KL gradient of zero, which an infinite KL would turn into NaN
        dq = launch_bwd(dz, None, q, seed, eps, num_samples, packed_dim, [], event_ndim, settings)
        return dq + [torch.zeros_like(p) for p in prior if prior_gradient]
    dkl = dkl.reshape(*dkl.shape, *[1] * event_ndim).expand(mu.shape)
    return launch_bwd(
        dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, settings, prior_gradient=prior_gradient
    )


def launch_fwd(q, seed, eps, num_samples, packed_dim, prior, event_ndim, settings, stream=POSTERIOR.value, *, with_kl):
    """(z, kl), or (z, None)."""
    scale, low, high, _ = settings
    mu, parameter = unpack(q, packed_dim)
    samples = 1 if num_samples is None else num_samples
    out_dtype = torch.promote_types(mu.dtype, parameter.dtype)
    if num_samples is None:
        z = torch.empty_like(mu, dtype=out_dtype)
    else:
        z = torch.empty((samples, *mu.shape), dtype=out_dtype, device=mu.device)
    noise, drawn = with_samples(eps, num_samples), with_samples(z, num_samples)
    tensors = [mu, parameter, *(p.expand(mu.shape) for p in prior), first(noise, mu), first(drawn, mu)]
    found = layout(tensors, event_ndim, reorder=False)
    if found is None:  # a view that no two dimensions an axis describe
        contiguous = [[mu.contiguous(), parameter.contiguous()], seed, None if eps is None else eps.contiguous()]
        prior = [p.contiguous() for p in prior]
        drawn, kl = launch_fwd(*contiguous, num_samples, -1, prior, event_ndim, settings, stream, with_kl=with_kl)
        return z.copy_(drawn), kl

    dtype = compute_dtype(tensors[:-2])
    block = blocks(found.rows, found.columns, tensors[:-2])
    row_blocks = cdiv(found.rows, block["ROWS"])
    shift = found.columns % 4 != 0
    programs = PROGRAMS // max(1, row_blocks) if with_kl else found.columns
    columns_per_program, splits = share(found.columns + 3 * shift, block["COLUMNS"], programs)
    batch = mu.shape[: mu.dim() - event_ndim]
    out = batch if splits == 1 else (splits, *batch)
    kl = torch.empty(out, dtype=dtype, device=mu.device) if with_kl else None
    if found.rows and (with_kl or found.columns):
        missing = 2 - len(prior)
        launch(
            rsample_kl_fwd_kernel, (row_blocks * splits,),
            *tensors[:-2], *[None] * missing, noise, drawn, kl, seed, found.shape,
            *found.strides[:-2], *[NO_STRIDES] * missing, *found.strides[-2:], *sample_strides(noise, drawn), samples,
            stream, columns_per_program, splits, low, high, SCALE=scale, BOUNDED=is_bounded(low, high), SHIFT=shift,
            NESTED=found.nested, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
        )  # fmt: skip
    if with_kl:
        kl = kl if splits == 1 else kl.sum(0)
    return z, kl


def launch_bwd(
    dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, settings, stream=POSTERIOR.value, *,
    prior_gradient=False,
):  # fmt: skip
    """The gradients of q, and of the prior where wanted. dkl is expanded to mu's shape, or None without a KL."""
    scale, low, high, live = settings
    mu, parameter = unpack(q, packed_dim)
    rows, columns = mu.shape[: mu.dim() - event_ndim].numel(), mu.shape[mu.dim() - event_ndim :].numel()
    samples = 1 if num_samples is None else num_samples
    gradients = [torch.empty_like(tensor) for tensor in (*q, *(prior if prior_gradient else ()))]
    if rows == 0 or columns == 0:
        return [gradient.zero_() for gradient in gradients]
    outputs = [*unpack(gradients[: len(q)], packed_dim), *gradients[len(q) :]]
    noise = with_samples(eps, num_samples)
    incoming = with_samples(dz, num_samples) if dz is not None else mu.new_zeros(()).expand(samples, *mu.shape)
    dtype = compute_dtype([mu, parameter, *prior])
    if dkl is not None and dkl.dtype != dtype:
        dkl = dkl.to(dtype)

    shift = columns % 4 != 0
    block = blocks(rows, columns, [mu, parameter, *prior])
    if dtype == torch.float32 and (samples > 1 or OLD_COMPILER):  # fewer would spill in bfloat16
        block |= registers(168)
    column_blocks = cdiv(columns + 3 * shift, block["COLUMNS"])
    shared = bool(prior_gradient and prior and prior[0].dim() < mu.dim())
    summed = shared and shift  # shifted rows do not line up in columns, so this gradient is written whole first
    if summed:
        outputs[2:] = [torch.empty(mu.shape, dtype=dtype, device=mu.device) for _ in range(2)]
    elif shared:
        rows_per_program, groups = share(rows, block["ROWS"], min(PROGRAMS // column_blocks, cdiv(rows, SHARED_ROWS)))
        partial = torch.empty((groups, 2, *mu.shape[mu.dim() - event_ndim :]), dtype=dtype, device=mu.device)
        outputs[2:] = [partial[0, 0].expand(mu.shape), partial[0, 1].expand(mu.shape)]
    if summed or not shared:
        rows_per_program, groups = block["ROWS"], cdiv(rows, block["ROWS"])

    full_prior = [p.expand(mu.shape) for p in prior]
    read = [first(incoming, mu), first(None, mu) if dkl is None else dkl, mu, parameter]
    found = layout([*read, *full_prior, first(noise, mu), *outputs], event_ndim, reorder=False)
    if found is None:
        contiguous = launch_bwd(
            incoming.contiguous() if num_samples is not None else incoming[0].contiguous(),
            None if dkl is None else dkl.contiguous(),
            [mu.contiguous(), parameter.contiguous()], seed, None if eps is None else eps.contiguous(), num_samples,
            -1, [p.contiguous() for p in prior], event_ndim, settings, stream,
            prior_gradient=prior_gradient,
        )  # fmt: skip
        finish([*unpack(gradients[: len(q)], packed_dim), *gradients[len(q) :]], contiguous)
        return gradients
    strides, missing, unwanted = found.strides, 2 - len(prior), 4 - len(outputs)
    launch(
        rsample_kl_bwd_kernel, (groups * column_blocks,),
        incoming, dkl, mu if dkl is not None else None, parameter, *full_prior, *[None] * missing, noise, *outputs,
        *[None] * unwanted, seed, found.shape,
        *strides[: 4 + len(prior)], *[NO_STRIDES] * missing, *strides[4 + len(prior) :], *[NO_STRIDES] * unwanted,
        *sample_strides(noise, incoming), samples, stream, rows_per_program, column_blocks, 2 * columns, low, high,
        SCALE=scale, BOUNDED=is_bounded(low, high), LIVE=live, SHARED=shared and not summed, SHIFT=shift,
        NESTED=found.nested, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    if shared:
        totals = [full.reshape(-1, *prior[0].shape).sum(0) for full in outputs[2:]] if summed else partial.sum(0)
        finish(gradients[len(q) :], list(totals))
    return gradients
