"""Both bounds on KL(q || mixture) at once: diagonal components and weights that all rows share, by direct differences.

In units of a component's sigma, t = (mu - m) / sigma_k and w = exp(logvar) / sigma_k^2, the two bounds take of it

    upper  -1/2 [t^2 + w + ...]                        E_q[ln N_k]
    lower  -1/2 [t^2 / (1 + w) + ln(1 + w) + ...]      ln E_q[N_k]

with the same terms that depend on the component alone: one prepared mixture, one t and one w serve both. 1 + w is never
small, so that its inverse is the square of one reciprocal root. The gradients need two weights for each row and
component, the incoming gradients times the responsibilities of the two sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import LN2, exp, two_parts
from fastkl.kernels._layout import PROGRAMS, cdiv, compute_dtype, next_power_of_2
from fastkl.kernels._mixture import (
    STEP,
    TRITON_DTYPE,
    add_exponentials,
    by_component,
    by_row,
    four,
    fraction_and_exponent,
    load_centred,
    load_rows,
    prepare,
    split,
    together,
)
from fastkl.kernels._mixture_gradient import FINISH, gmm_finish_kernel


def blocks(dtype: torch.dtype, kind: str, rows: int, components: int, *, tail: bool) -> dict[str, int]:
    """A tile of rows x components for the kernel "forward", by "rows" or by "components".

    As kernels._mixture's, with fewer elements a thread, each of which takes two sums or weights. `tail`: the last step
    of the inner loop is masked.
    """
    half = dtype == torch.float64
    if kind == "components":
        warps = min(8, next_power_of_2(cdiv(rows, 32)))
        return {"ROWS": (2 if half else 8) * warps, "COMPONENTS": 32, "num_warps": warps}
    components_each = (2 if half and kind == "rows" else 4) if half else 8 if tail else 16
    if kind == "rows" and cdiv(rows, 64) < PROGRAMS // 2:  # few programs: its warps share a sum over components
        warps = min(4, next_power_of_2(cdiv(components, 32)))
        return {"ROWS": 32, "COMPONENTS": components_each * warps, "num_warps": warps}
    return {"ROWS": 32, "COMPONENTS": components_each, "num_warps": 1}


# ---- Device functions ------------------------------------------------------------------------------------------------


@triton.jit
def element(z, variance, s, scaled_mean):
    """(t, w, 1 / sqrt(1 + w)) of one dimension; z and scaled_mean are centred."""
    t = z * s - scaled_mean
    w = variance * (s * s)
    return t, w, tl.rsqrt(1.0 + w)


@triton.jit
def joint_tiles(
    mu_at, logvar_at, normaliser, centre, constants, roots, scaled_means, start, shape, steps,
    TAIL: tl.constexpr, BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """ln pi_k + what the lower, and the upper, bound takes of component k: [COMPONENTS, ROWS] by rows, else transposed.

    Always by the same operations in the same order: backward subtracts the saved log-densities from these very values.
    """
    lower = tl.zeros([COMPONENTS, ROWS] if BY_ROWS else [ROWS, COMPONENTS], dtype=DTYPE)
    upper = tl.zeros(lower.shape, dtype=DTYPE)
    # The product of all 1 + w as product 2^exponent, 1 <= product < 2: one logarithm in the end.
    product = tl.full(lower.shape, 1.0, dtype=DTYPE)
    exponent = tl.zeros(lower.shape, dtype=tl.int32)
    lanes = tl.arange(0, COMPONENTS)  # constants, so that they become part of the load instructions
    roots += start
    scaled_means += start
    for d in range(0, shape[0], 4):
        zs = four(load_centred(mu_at, centre, d, shape[0], "expected", TAIL, DTYPE), ROWS)
        vs = four(exp(load_rows(logvar_at, d, shape[0], TAIL, DTYPE)), ROWS)
        mu_at += steps[0]
        logvar_at += steps[1]
        for i in tl.static_range(4):
            s = by_component(tl.load(roots + lanes), BY_ROWS)
            scaled_mean = by_component(tl.load(scaled_means + lanes), BY_ROWS)
            roots += shape[2]
            scaled_means += shape[2]
            t, w, root = element(by_row(zs[i], BY_ROWS), by_row(vs[i], BY_ROWS), s, scaled_mean)
            upper += t * t
            upper += w
            product, power = fraction_and_exponent(product * (1.0 + w))
            exponent += power
            t *= root
            lower += t * t
    lower += tl.log(product) + exponent.to(DTYPE) * LN2
    constant = by_component(tl.load(constants + start + lanes) - tl.load(normaliser), BY_ROWS)
    return constant - 0.5 * lower, constant - 0.5 * upper


@triton.jit
def weights(joint, lp, gradient, row, BY_ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Gradient in the joint log-densities: bounds fall as log-densities rise."""
    value, rest = two_parts(tl.load(lp + row), DTYPE)
    return -by_row(gradient, BY_ROWS) * exp(joint - by_row(value, BY_ROWS) - by_row(rest, BY_ROWS))


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def kl_gmm_bounds_fwd_kernel(
    mu, logvar, normaliser, centre, constants, roots, scaled_means, lower, upper, negative_entropy, rows, shape,
    strides, components_per_program, splits, TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`splits` programs share a block of rows; lower and upper, log-densities, are [splits, rows], float64."""
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(index, rows - 1).to(tl.int64)  # beyond the last row it again: no mask in the inner loop
    quad = tl.arange(0, 4).to(tl.int64)[None, :]
    mu_at = mu + row[:, None] * strides[0][0] + quad * strides[0][1]
    logvar_at = logvar + row[:, None] * strides[1][0] + quad * strides[1][1]
    steps = (strides[0][1] * 4, strides[1][1] * 4)
    low_top = tl.full([ROWS], float("-inf"), dtype=DTYPE)
    high_top = tl.full([ROWS], float("-inf"), dtype=DTYPE)
    low_total = tl.zeros([ROWS], dtype=DTYPE)
    high_total = tl.zeros([ROWS], dtype=DTYPE)
    first = split * components_per_program
    for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
        low, high = joint_tiles(
            mu_at, logvar_at, normaliser, centre, constants, roots, scaled_means, start, shape, steps,
            TAIL, True, ROWS, COMPONENTS, DTYPE,
        )  # fmt: skip
        low_top, low_total = add_exponentials(low_top, low_total, low, 0)
        high_top, high_total = add_exponentials(high_top, high_total, high, 0)
    at = split.to(tl.int64) * rows + index
    tl.store(lower + at, low_top.to(tl.float64) + tl.log(low_total).to(tl.float64), mask=index < rows)
    tl.store(upper + at, high_top.to(tl.float64) + tl.log(high_total).to(tl.float64), mask=index < rows)
    if split == 0:
        total = tl.zeros([ROWS, 4], dtype=DTYPE)
        for d in range(0, shape[0], 4):
            total += load_rows(logvar_at, d, shape[0], TAIL, DTYPE)
            logvar_at += steps[1]
        value = -0.5 * (tl.sum(total, axis=1) + tl.full([ROWS], 2.8378770664093453, dtype=DTYPE) * shape[0])
        tl.store(negative_entropy + index, value.to(tl.float64), mask=index < rows)


@triton.jit
def kl_gmm_bounds_rows_kernel(
    dlower, dupper, lower, upper, mu, logvar, normaliser, centre, constants, roots, scaled_means, dmu, dlogvar,
    rows, shape, strides, split_strides, components_per_program, splits,
    TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of mu and logvar (per split), kept in the outputs from tile to tile. lower and upper are log-densities,
    float64."""
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(index, rows - 1).to(tl.int64)  # beyond the last row it again, not stored
    quad = tl.arange(0, 4).to(tl.int64)[None, :]
    steps = (strides[0][1] * 4, strides[1][1] * 4)
    mu_start = mu + row[:, None] * strides[0][0] + quad * strides[0][1]
    logvar_start = logvar + row[:, None] * strides[1][0] + quad * strides[1][1]
    dmu += split.to(tl.int64) * split_strides[0] + row[:, None] * strides[4][0] + quad * strides[4][1]
    dlogvar += split.to(tl.int64) * split_strides[1] + row[:, None] * strides[5][0] + quad * strides[5][1]
    to_lower = tl.load(dlower + row * strides[2]).to(DTYPE)
    to_upper = tl.load(dupper + row * strides[3]).to(DTYPE)
    of_entropy = tl.where(split == 0, -0.5, 0.0) * (to_lower + to_upper)[:, None]
    first = split * components_per_program
    for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
        low, high = joint_tiles(
            mu_start, logvar_start, normaliser, centre, constants, roots, scaled_means, start, shape, steps,
            TAIL, True, ROWS, COMPONENTS, DTYPE,
        )  # fmt: skip
        low = weights(low, lower, to_lower, row, True, DTYPE)
        high = weights(high, upper, to_upper, row, True, DTYPE)
        mu_at, logvar_at, dmu_at, dlogvar_at = mu_start, logvar_start, dmu, dlogvar
        roots_at, means_at = roots + start, scaled_means + start
        for d in range(0, shape[0], 4):
            zs = four(load_centred(mu_at, centre, d, shape[0], "expected", TAIL, DTYPE), ROWS)
            vs = four(exp(load_rows(logvar_at, d, shape[0], TAIL, DTYPE)), ROWS)
            sums, others = (), ()
            for i in tl.static_range(4):
                s = tl.load(roots_at + tl.arange(0, COMPONENTS))[:, None]
                scaled_mean = tl.load(means_at + tl.arange(0, COMPONENTS))[:, None]
                roots_at += shape[2]
                means_at += shape[2]
                t, _, root = element(zs[i][None, :], vs[i][None, :], s, scaled_mean)
                narrowed = low * (root * root)
                sums += (tl.sum((high + narrowed) * (t * s), axis=0),)
                t *= root
                others += (tl.sum((narrowed * (t * t - 1.0) - high) * (s * s), axis=0) * vs[i] * 0.5,)
            mask = (index < rows)[:, None]
            if TAIL:
                mask = mask & (d + tl.arange(0, 4) < shape[0])[None, :]
            old = mask & (start + tl.arange(0, 1) > first)[:, None]  # else nothing but the entropy's yet
            before = tl.load(dmu_at, old, other=0.0).to(DTYPE)
            tl.store(dmu_at, before - together(sums[0], sums[1], sums[2], sums[3], ROWS), mask)
            before = tl.where(old, tl.load(dlogvar_at, old, other=0.0).to(DTYPE), of_entropy)
            tl.store(dlogvar_at, before + together(others[0], others[1], others[2], others[3], ROWS), mask)
            mu_at += steps[0]
            logvar_at += steps[1]
            dmu_at += strides[4][1] * 4
            dlogvar_at += strides[5][1] * 4


@triton.jit
def kl_gmm_bounds_components_kernel(
    dlower, dupper, lower, upper, mu, logvar, normaliser, centre, constants, roots, scaled_means, counts, sums, squared,
    rows, shape, strides, part_stride, rows_per_program, component_blocks,
    TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Per share of the rows, what gmm_finish_kernel takes: counts [K], the sum of both weights; sums [D, K], that of
    the gradients in t; squared [D, K] (or None), that of twice the gradients in ln S_k plus the weights."""
    part = tl.program_id(0) // component_blocks
    start_component = tl.program_id(0) % component_blocks * COMPONENTS
    lanes = tl.arange(0, COMPONENTS)
    quad = tl.arange(0, 4).to(tl.int64)[None, :]
    steps = (strides[0][1] * 4, strides[1][1] * 4)
    first = part * rows_per_program
    sums_start = sums + part.to(tl.int64) * part_stride + start_component
    if squared is not None:
        squared_start = squared + part.to(tl.int64) * part_stride + start_component
    count = tl.zeros([COMPONENTS], dtype=DTYPE)
    for start in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
        index = start + tl.arange(0, ROWS)
        row = tl.minimum(index, rows - 1).to(tl.int64)  # beyond the last row it again, with no weight
        mu_at = mu + row[:, None] * strides[0][0] + quad * strides[0][1]
        logvar_at = logvar + row[:, None] * strides[1][0] + quad * strides[1][1]
        low, high = joint_tiles(
            mu_at, logvar_at, normaliser, centre, constants, roots, scaled_means, start_component, shape, steps,
            TAIL, False, ROWS, COMPONENTS, DTYPE,
        )  # fmt: skip
        gradient = tl.load(dlower + row * strides[2], mask=index < rows, other=0.0).to(DTYPE)
        low = weights(low, lower, gradient, row, False, DTYPE)
        gradient = tl.load(dupper + row * strides[3], mask=index < rows, other=0.0).to(DTYPE)
        high = weights(high, upper, gradient, row, False, DTYPE)
        count += tl.sum(low + high, axis=0)
        roots_at, means_at, sums_at = roots + start_component, scaled_means + start_component, sums_start
        if squared is not None:
            squared_at = squared_start
        again = start + tl.arange(0, 1) > first  # else 0: nothing yet
        for d in range(0, shape[0], 4):
            zs = four(load_centred(mu_at, centre, d, shape[0], "expected", TAIL, DTYPE), ROWS)
            vs = four(exp(load_rows(logvar_at, d, shape[0], TAIL, DTYPE)), ROWS)
            mu_at += steps[0]
            logvar_at += steps[1]
            for i in tl.static_range(4):
                s = tl.load(roots_at + lanes)[None, :]
                t, w, root = element(zs[i][:, None], vs[i][:, None], s, tl.load(means_at + lanes)[None, :])
                narrowed = low * (root * root)
                moment = tl.sum((high + narrowed) * t, axis=0)
                tl.store(sums_at + lanes, tl.load(sums_at + lanes, again, other=0.0) + moment)
                sums_at += shape[2]
                if squared is not None:
                    scaled = t * root
                    moment = tl.sum(high * (t * t + w) + (narrowed * (scaled * scaled - 1.0) + low), axis=0)
                    tl.store(squared_at + lanes, tl.load(squared_at + lanes, again, other=0.0) + moment)
                    squared_at += shape[2]
                roots_at += shape[2]
                means_at += shape[2]
    tl.store(counts + part.to(tl.int64) * shape[2] + start_component + lanes, count)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def fused(mu, logits, means, scale_tril, precision) -> bool:
    """Weights or components of their own, full covariances and tensor cores go through the mixture's kernels twice."""
    return len(logits) == len(means) == 1 and scale_tril is None and precision == "exact" and len(mu) > 0


def fwd(mu, logvar, logits, means, logvars, scale_tril, precision, keep):
    """[lower, upper], each [R], and with `keep` the two log-densities in float64."""
    if not fused(mu, logits, means, scale_tril, precision):
        return NotImplemented
    dtype = compute_dtype([t for t in (mu, logvar, logits, means, logvars) if t is not None])
    (rows, columns), components, device = mu.shape, means.shape[1], mu.device
    mixture = prepare(logits, means, logvars, "expected", dtype)
    tail = columns % STEP != 0
    block = blocks(dtype, "forward", rows, components, tail=tail)
    row_blocks = cdiv(rows, block["ROWS"])
    length, splits = split(components, block["COMPONENTS"], row_blocks, 2 * rows * 8)
    lp = torch.empty((2, splits, rows), dtype=torch.float64, device=device)
    negative_entropy = torch.empty(rows, dtype=torch.float64, device=device)
    kl_gmm_bounds_fwd_kernel[(row_blocks * splits,)](
        mu, logvar, *mixture, *lp, negative_entropy, rows, (columns, components, mixture.padded),
        (mu.stride(), logvar.stride()), length, splits, TAIL=tail, DTYPE=TRITON_DTYPE[dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    lp = lp[:, 0] if splits == 1 else lp.logsumexp(1)
    bounds = torch.sub(negative_entropy, lp, out=torch.empty((2, rows), dtype=dtype, device=device))
    return [*bounds, *lp] if keep else [*bounds]


def by_rows(given, mu, logvar, components, mixture):
    """[dmu, dlogvar]."""
    (rows, columns), dtype = mu.shape, mixture.roots.dtype
    tail = columns % STEP != 0
    block = blocks(dtype, "rows", rows, components, tail=tail)
    row_blocks = cdiv(rows, block["ROWS"])
    length, splits = split(components, block["COMPONENTS"], row_blocks, 2 * rows * columns * dtype.itemsize)
    outputs = [torch.empty_like(mu), torch.empty_like(logvar)]
    # What is added to more than once is added up in the compute dtype.
    again = splits > 1 or components > block["COMPONENTS"]
    written = [
        torch.empty((splits, rows, columns), dtype=dtype, device=mu.device)
        if splits > 1 or (again and output.dtype != dtype)
        else output
        for output in outputs
    ]
    strides = (mu.stride(), logvar.stride(), given[0].stride(0), given[1].stride(0))
    kl_gmm_bounds_rows_kernel[(row_blocks * splits,)](
        *given, mu, logvar, *mixture, *written, rows, (columns, components, mixture.padded),
        (*strides, *(w.stride()[-2:] for w in written)), tuple(w.stride(0) if w.dim() == 3 else 0 for w in written),
        length, splits, TAIL=tail, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    return [o if o is w else o.copy_(w.sum(0)) for o, w in zip(outputs, written)]


def by_components(given, mu, logvar, logits, means, logvars, mixture):
    """[dlogits, dmeans, dlogvars or None]."""
    (rows, columns), components, device = mu.shape, means.shape[1], mu.device
    (padded_columns, padded), dtype = mixture.roots.shape, mixture.roots.dtype
    second, tail = logvars is not None, columns % STEP != 0
    block = blocks(dtype, "components", rows, components, tail=tail)
    component_blocks, part = cdiv(components, block["COMPONENTS"]), padded_columns * padded
    partial = part * (1 + second) * dtype.itemsize
    length, parts = split(rows, block["ROWS"], component_blocks, partial, 2 * mu.numel() * mu.itemsize)
    counts = torch.empty((parts, padded), dtype=dtype, device=device)
    sums = torch.empty((1 + second, parts, padded_columns, padded), dtype=dtype, device=device)
    squared, shape = sums[1] if second else None, (columns, components, padded)
    kl_gmm_bounds_components_kernel[(component_blocks * parts,)](
        *given, mu, logvar, *mixture, counts, sums[0], squared, rows, shape,
        (mu.stride(), logvar.stride(), given[0].stride(0), given[1].stride(0)), part, length, component_blocks,
        TAIL=tail, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    count, dmeans = torch.empty(components, dtype=dtype, device=device), torch.empty_like(means)
    whole = second and logvars.shape == means.shape  # else summed afterwards
    dlogvars = torch.empty_like(logvars) if whole else torch.empty(means.shape, dtype=dtype, device=device)
    column_blocks = cdiv(columns, FINISH["COLUMNS"])
    gmm_finish_kernel[(cdiv(components, FINISH["COMPONENTS"]) * column_blocks,)](
        counts, sums[0], squared, mixture.roots, dmeans, dlogvars, count, parts, shape, part, column_blocks,
        (dmeans.stride()[1:], dlogvars.stride()[1:]), KIND="gradient", DTYPE=TRITON_DTYPE[dtype],
        enable_fp_fusion=True, **FINISH,
    )  # fmt: skip
    count += torch.softmax(logits[0].to(dtype), 0) * (given[0].sum(dtype=dtype) + given[1].sum(dtype=dtype))
    if second and not whole:
        dlogvars = torch.empty_like(logvars).copy_(dlogvars.sum_to_size(logvars.shape))
    return [torch.empty_like(logits).copy_(count), dmeans, dlogvars if second else None]


def bwd(dlower, dupper, kept, mu, logvar, logits, means, logvars, scale_tril, precision, data, parameters):
    """Gradients of (mu, logvar) if `data`, of the mixture's tensors if `parameters`."""
    if dlower is None or dupper is None or not fused(mu, logits, means, scale_tril, precision):
        return NotImplemented
    dtype = compute_dtype([t for t in (mu, logvar, logits, means, logvars) if t is not None])
    mixture, given = prepare(logits, means, logvars, "expected", dtype), (dlower, dupper, *kept)
    out = by_rows(given, mu, logvar, means.shape[1], mixture) if data else []
    if parameters:
        out += by_components(given, mu, logvar, logits, means, logvars, mixture)
    return [tensor for tensor in out if tensor is not None]
