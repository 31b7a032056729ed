"""The RBF kernel between Gaussian posteriors, summed over all pairs, and its gradient, with the tiles of mmd.

A program has some posteriors and a share of the others. For each scale one pass over the dimensions gives exponents and
determinants of a tile of pairs, and a second pass the gradient. Variances are computed before; values per pair stay in
registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import proportion
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, compute_dtype, next_power_of_2, registers
from fastkl.kernels.mixture._mixture import four, load_rows, of_rows, own_index, quads, term_index
from fastkl.kernels.mixture._mixture_rows import summed
from fastkl.kernels.mixture._mixture_tiles import scattered, split
from fastkl.kernels.pairs.mmd import beside, chosen


def blocks(dtype: torch.dtype, others: int, anywhere: bool, *, gradient: bool) -> dict[str, int]:
    """Like mmd's, but a pair needs more registers. `anywhere`: rows may be unaligned, which needs more pointers."""
    terms = 8 // (1 + (gradient or dtype == torch.float64))
    groups = min(4, next_power_of_2(cdiv(others, terms)))
    owned = 1 if anywhere or dtype == torch.float64 else 2
    return {
        "ROWS": owned * 32,
        "OTHERS": terms * groups,
        "TERMS": terms,
        "LANES": 32,
        "num_warps": groups,
        **registers(255),
    }


@triton.jit
def ratio(mean, variance, other_mean, other_variance, inverse):
    """(u, r): the difference of the means, and 1 / (1 + w / g) with w the sum of the variances and g = 1 / inverse."""
    return mean - other_mean, 1.0 / ((variance * inverse + 1.0) + other_variance * inverse)


@triton.jit
def mmd_normal_kernel(
    mean, variance, other_means, other_variances, sums, dmean, dvariance, rows, count, shape, mean_strides,
    variance_strides, split_stride, per_program, splits, INVERSES: tl.constexpr, SELF: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, OTHERS: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program's sum of K over its pairs, and per split dmean_i = sum_j -K u r / g and
    dvariance_i = sum_j K r (u^2 r / g - 1) / (2 g).

    shape is (dimensions, padded others); INVERSES are the 1 / g."""
    columns, padded = shape
    dtype: tl.constexpr = other_means.dtype.element_ty
    share = tl.program_id(0) % splits
    first_row = tl.program_id(0) // splits * ROWS
    index = first_row + tl.arange(0, ROWS)
    valid = index < rows
    row = tl.minimum(index, rows - 1).to(tl.int64)  # past the end the last row, neither counted nor stored
    mean_start, variance_start = quads(mean, row, mean_strides), quads(variance, row, variance_strides)
    own = first_row + own_index(ROWS, LANES)
    first = share * per_program
    end = tl.minimum(first + per_program, count)
    if dmean is not None:
        dmean_start = quads(dmean + share.to(tl.int64) * split_stride, row, (columns, 1))
        dvariance_start = quads(dvariance + share.to(tl.int64) * split_stride, row, (columns, 1))
    lanes = term_index(OTHERS, TERMS)
    total = tl.zeros([ROWS // LANES, OTHERS // TERMS, LANES], dtype=dtype)
    for start in range(first, end, OTHERS):
        other = start + lanes
        inside = (other < end) & (own < rows)
        if not SELF:
            inside = inside & (other != own)
        for scale in range(len(INVERSES)):
            inverse = chosen(scale, INVERSES, dtype)
            mean_at, variance_at = mean_start, variance_start
            means_at, variances_at = other_means + start, other_variances + start
            exponent = tl.zeros([ROWS // LANES, TERMS, OTHERS // TERMS, LANES], dtype=dtype)
            product = exponent + 1.0
            for d in range(0, columns, 4):
                ms = four(load_rows(mean_at, d, columns, TAIL, dtype), ROWS)
                vs = four(load_rows(variance_at, d, columns, TAIL, dtype), ROWS)
                mean_at += mean_strides[1] * 4
                variance_at += variance_strides[1] * 4
                for i in tl.static_range(4):
                    u, r = ratio(
                        of_rows(ms[i], True, TERMS, LANES), of_rows(vs[i], True, TERMS, LANES),
                        tl.load(means_at + lanes), tl.load(variances_at + lanes), inverse,
                    )  # fmt: skip
                    means_at += padded
                    variances_at += padded
                    exponent += u * u * r
                    product *= r  # underflows only for a negligible kernel value
            value = tl.where(inside, proportion(exponent * (-0.5 * inverse)) * tl.sqrt(product), 0.0)
            total += tl.sum(value, axis=1)
            if dmean is not None:
                value *= inverse
                mean_at, variance_at, dmean_at, dvariance_at = mean_start, variance_start, dmean_start, dvariance_start
                means_at, variances_at = other_means + start, other_variances + start
                for d in range(0, columns, 4):
                    ms = four(load_rows(mean_at, d, columns, TAIL, dtype), ROWS)
                    vs = four(load_rows(variance_at, d, columns, TAIL, dtype), ROWS)
                    mean_at += mean_strides[1] * 4
                    variance_at += variance_strides[1] * 4
                    firsts, seconds = (), ()  # mypy lets no tuple grow
                    for i in tl.static_range(4):
                        u, r = ratio(
                            of_rows(ms[i], True, TERMS, LANES), of_rows(vs[i], True, TERMS, LANES),
                            tl.load(means_at + lanes), tl.load(variances_at + lanes), inverse,
                        )  # fmt: skip
                        means_at += padded
                        variances_at += padded
                        weight = value * r
                        firsts += (tl.sum(weight * u, axis=1),)  # type: ignore[assignment]
                        seconds += (tl.sum(weight * (u * u * r * inverse - 1.0), axis=1),)  # type: ignore[assignment]
                    mask = valid[:, None] & (d + tl.arange(0, 4) < columns)[None, :]
                    old = mask & (start + tl.arange(0, 1) + scale > first)[:, None]  # the first tile starts from 0
                    tl.store(dmean_at, tl.load(dmean_at, old, other=0.0) - summed(firsts), mask)
                    tl.store(dvariance_at, tl.load(dvariance_at, old, other=0.0) + 0.5 * summed(seconds), mask)
                    dmean_at += 4
                    dvariance_at += 4
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.sum(total, axis=2), axis=1), axis=0))


def sums_over_pairs(
    mu: Tensor, logvar: Tensor, other_mu: Tensor, other_logvar: Tensor, scales: Sequence[float], *, self_pairs: bool,
    gradient: bool,
) -> list[Tensor]:  # fmt: skip
    """[the sum over pairs, dmu and dlogvar of it if `gradient`]: one pass over the dimensions gives both gradients."""
    dtype = compute_dtype([mu, logvar])
    (rows, columns), count = mu.shape, len(other_mu)
    variance = logvar.to(dtype).exp()
    others = beside(other_mu, dtype), beside(other_logvar.to(dtype).exp(), dtype)
    block = blocks(dtype, count, bool(scattered(mu, variance)), gradient=gradient)
    row_blocks = cdiv(rows, block["ROWS"])
    partial_bytes = 2 * rows * columns * dtype.itemsize * gradient
    per_program, splits = split(count, block["OTHERS"], row_blocks, partial_bytes)
    sums = torch.empty(row_blocks * splits, dtype=dtype, device=mu.device)
    parts = torch.empty((2, splits, rows, columns), dtype=dtype, device=mu.device) if gradient else None
    launch(
        mmd_normal_kernel, (row_blocks * splits,),
        mu, variance, *others, sums, *((None, None) if parts is None else parts), rows, count,
        (columns, others[0].shape[1]), mu.stride(), variance.stride(), rows * columns, per_program, splits,
        INVERSES=tuple(1 / (columns * s) for s in scales), SELF=self_pairs, TAIL=columns % 4 > 0,
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    total = sums.sum(dtype=torch.float64)
    if parts is None:
        return [total]
    dmean, dvariance = parts.sum(1)
    return [total, dmean, dvariance.mul_(variance)]


def fwd(mu: Tensor, logvar: Tensor, scales: Sequence[float], unbiased: bool, dmu: bool, dlogvar: bool) -> list[Tensor]:
    rows, pair = len(mu), (mu, logvar)
    weight = 1 / (rows * (rows - 1) if unbiased else rows * rows)
    total, *gradients = sums_over_pairs(*pair, *pair, scales, self_pairs=not unbiased, gradient=dmu or dlogvar)
    return [total * weight, *(each.mul_(2 * weight) for each, wanted in zip(gradients, (dmu, dlogvar)) if wanted)]


def between(
    mu: Tensor, logvar: Tensor, other_mu: Tensor, other_logvar: Tensor, scales: Sequence[float], gradient: bool
) -> list[Tensor]:  # fmt: skip
    return sums_over_pairs(mu, logvar, other_mu, other_logvar, scales, self_pairs=True, gradient=gradient)
