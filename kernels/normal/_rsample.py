"""The kernels of rsample_normal and rsample_kl: reparameterised sampling, with or without the KL.

The noise comes from Philox in registers. Backward draws it again from the 8-byte seed, so it is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from fastkl.kernels._device import (
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
from fastkl.kernels._layout import SPILLS_A_FEW, View, next_power_of_2, registers
from fastkl.kernels._noise import row_noise, shifted_columns
from fastkl.kernels._tile import elements, load_rows, run_of_columns, run_of_rows, store_columns
from fastkl.kernels._tuned import TILES

# Elements of a tile whose rows cannot be read 16 bytes at a time.
ODD_TILE = {2: 512, 4: 512, 8: 256}


def blocks(rows: int, columns: int, tensors: Sequence[View]) -> dict[str, int]:
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
