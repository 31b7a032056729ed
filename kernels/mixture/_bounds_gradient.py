"""Gradients of both bounds on KL(q || mixture) at once: by rows, for q, and by components, for the mixture.

Each row and component has two weights, the cotangents times the responsibilities of the two sums. As in
kernels._mixture_gradient, a tile's distances are recomputed, a second loop runs over the dimensions, and sums split
over programs have partial sums, which are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, finish, place
from fastkl.kernels.mixture._bounds import blocks, element, joint_tiles, load_four, together, weights
from fastkl.kernels.mixture._mixture import quads
from fastkl.kernels.mixture._mixture_components import finish_parts
from fastkl.kernels.mixture._mixture_prepare import SHRUNK, Prepared
from fastkl.kernels.mixture._mixture_tiles import scattered, split


@triton.jit
def kl_gmm_bounds_rows_kernel(
    dlower, dupper, lower, upper, mu, logvar, normaliser, constants, roots, means, dmu, dlogvar,
    rows, shape, mu_strides, logvar_strides, dlower_stride, dupper_stride, dmu_strides, dlogvar_strides,
    dmu_split_stride, dlogvar_split_stride, components_per_program, splits,
    TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of mu and logvar (per split), accumulated in the outputs. lower and upper are log-densities in
    float64."""
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(index, rows - 1).to(tl.int64)  # past the end the last row, not stored
    steps = (mu_strides[1] * 4, logvar_strides[1] * 4)
    mu_start, logvar_start = quads(mu, row, mu_strides), quads(logvar, row, logvar_strides)
    dmu = quads(dmu + split.to(tl.int64) * dmu_split_stride, row, dmu_strides)
    dlogvar = quads(dlogvar + split.to(tl.int64) * dlogvar_split_stride, row, dlogvar_strides)
    to_lower = tl.load(dlower + row * dlower_stride).to(DTYPE)
    to_upper = tl.load(dupper + row * dupper_stride).to(DTYPE)
    of_entropy = tl.where(split == 0, -0.5, 0.0) * (to_lower + to_upper)[:, None]
    first = split * components_per_program
    for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
        low, high = joint_tiles(
            mu_start, logvar_start, normaliser, constants, roots, means, start, shape, steps,
            TAIL, True, ROWS, COMPONENTS, DTYPE,
        )  # fmt: skip
        low = weights(low, lower, to_lower, row, True, DTYPE)
        high = weights(high, upper, to_upper, row, True, DTYPE) / (SHRUNK * SHRUNK)
        mu_at, logvar_at, dmu_at, dlogvar_at = mu_start, logvar_start, dmu, dlogvar
        roots_at, means_at = roots + start, means + start
        for d in range(0, shape[0], 4):
            zs, vs = load_four(mu_at, logvar_at, d, shape[0], TAIL, ROWS, DTYPE)
            sums, others = (), ()  # mypy lets no tuple grow
            for i in tl.static_range(4):
                s = tl.load(roots_at + tl.arange(0, COMPONENTS))[:, None]
                mean = tl.load(means_at + tl.arange(0, COMPONENTS))[:, None]
                roots_at += shape[2]
                means_at += shape[2]
                t, u, one_plus_w = element(zs[i][None, :], vs[i][None, :], s, mean)
                root = tl.rsqrt(one_plus_w)
                narrowed = low * (root * root)
                sums += (tl.sum((high + narrowed) * t * s, axis=0),)  # type: ignore[assignment]
                t *= root
                others += (tl.sum((narrowed * t * t - narrowed - high) * u * s, axis=0) * vs[i] * 0.5,)  # type: ignore[assignment]
            mask = (index < rows)[:, None]
            if TAIL:
                mask = mask & (d + tl.arange(0, 4) < shape[0])[None, :]
            old = mask & (start + tl.arange(0, 1) > first)[:, None]  # the first tile starts from the entropy's gradient
            before = tl.load(dmu_at, old, other=0.0).to(DTYPE)
            tl.store(dmu_at, before - together(sums[0], sums[1], sums[2], sums[3], ROWS), mask)  # type: ignore[misc]
            before = tl.where(old, tl.load(dlogvar_at, old, other=0.0).to(DTYPE), of_entropy)
            tl.store(dlogvar_at, before + together(others[0], others[1], others[2], others[3], ROWS), mask)  # type: ignore[misc]
            mu_at += steps[0]
            logvar_at += steps[1]
            dmu_at += dmu_strides[1] * 4
            dlogvar_at += dlogvar_strides[1] * 4


@triton.jit
def kl_gmm_bounds_components_kernel(
    dlower, dupper, lower, upper, mu, logvar, normaliser, constants, roots, means, counts, sums, squared,
    rows, shape, mu_strides, logvar_strides, dlower_stride, dupper_stride, part_stride, rows_per_program,
    component_blocks,
    TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Per part of the rows, the inputs of gmm_finish_kernel: counts [K], sums of both weights; sums [D, K], sums of the
    gradients in the mean over s; squared [D, K] (or None), sums of twice the gradients in ln S_k plus the weights."""
    part = tl.program_id(0) // component_blocks
    start_component = tl.program_id(0) % component_blocks * COMPONENTS
    lanes = tl.arange(0, COMPONENTS)
    steps = (mu_strides[1] * 4, logvar_strides[1] * 4)
    first = part * rows_per_program
    sums_start = sums + part.to(tl.int64) * part_stride + start_component
    if squared is not None:
        squared_start = squared + part.to(tl.int64) * part_stride + start_component
    count = tl.zeros([COMPONENTS], dtype=DTYPE)
    for start in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
        index = start + tl.arange(0, ROWS)
        row = tl.minimum(index, rows - 1).to(tl.int64)  # past the end the last row, with weight 0
        mu_at, logvar_at = quads(mu, row, mu_strides), quads(logvar, row, logvar_strides)
        low, high = joint_tiles(
            mu_at, logvar_at, normaliser, constants, roots, means, start_component, shape, steps,
            TAIL, False, ROWS, COMPONENTS, DTYPE,
        )  # fmt: skip
        gradient = tl.load(dlower + row * dlower_stride, mask=index < rows, other=0.0).to(DTYPE)
        low = weights(low, lower, gradient, row, False, DTYPE)
        gradient = tl.load(dupper + row * dupper_stride, mask=index < rows, other=0.0).to(DTYPE)
        high = weights(high, upper, gradient, row, False, DTYPE)
        count += tl.sum(low + high, axis=0)
        high /= SHRUNK * SHRUNK
        roots_at, means_at, sums_at = roots + start_component, means + start_component, sums_start
        if squared is not None:
            squared_at = squared_start
        again = start + tl.arange(0, 1) > first  # the first block starts from 0
        for d in range(0, shape[0], 4):
            zs, vs = load_four(mu_at, logvar_at, d, shape[0], TAIL, ROWS, DTYPE)
            mu_at += steps[0]
            logvar_at += steps[1]
            for i in tl.static_range(4):
                s = tl.load(roots_at + lanes)[None, :]
                t, u, one_plus_w = element(zs[i][:, None], vs[i][:, None], s, tl.load(means_at + lanes)[None, :])
                root = tl.rsqrt(one_plus_w)
                narrowed = low * (root * root)
                moment = tl.sum((high + narrowed) * t, axis=0)
                tl.store(sums_at + lanes, tl.load(sums_at + lanes, again, other=0.0) + moment)
                sums_at += shape[2]
                if squared is not None:
                    w, scaled = u * u, t * root * SHRUNK
                    moment = tl.sum(high * (t * t + w) + narrowed * (scaled * scaled + w), axis=0)
                    tl.store(squared_at + lanes, tl.load(squared_at + lanes, again, other=0.0) + moment)
                    squared_at += shape[2]
                roots_at += shape[2]
                means_at += shape[2]
    tl.store(counts + part.to(tl.int64) * shape[2] + start_component + lanes, count)


def by_rows(
    given: tuple[Tensor, ...], mu: Tensor, logvar: Tensor, components: int, mixture: Prepared,
    outputs: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Write (dmu, dlogvar); None is not wanted."""
    (rows, columns), dtype = mu.shape, mixture.roots.dtype
    odd = scattered(mu, logvar)
    block = blocks(dtype, "rows", rows, components, scattered=odd)
    row_blocks = cdiv(rows, block["ROWS"])
    length, splits = split(components, block["COMPONENTS"], row_blocks, 2 * rows * columns * dtype.itemsize)
    # What is added to more than once is added up in the compute dtype.
    again = splits > 1 or components > block["COMPONENTS"]
    written = [
        torch.empty((splits, rows, columns), dtype=dtype, device=mu.device)
        if splits > 1 or (again and output.dtype != dtype)
        else output
        for output in map(place, outputs, (mu, logvar))
    ]
    launch(
        kl_gmm_bounds_rows_kernel, (row_blocks * splits,), *given, mu, logvar, *mixture, *written, rows,
        (columns, components, mixture.padded), mu.stride(), logvar.stride(), given[0].stride(0), given[1].stride(0),
        *(w.stride()[-2:] for w in written), *(w.stride(0) if w.dim() == 3 else 0 for w in written), length, splits,
        TAIL=odd == "tail", DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    finish(outputs, [w.sum(0) if w.dim() == 3 else w for w in written])


def by_components(
    given: tuple[Tensor, ...], mu: Tensor, logvar: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | None,
    mixture: Prepared, outputs: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Write (dlogits, dmeans, dlogvars); None is not wanted."""
    (rows, columns), components, device = mu.shape, means.shape[1], mu.device
    (padded_columns, padded), dtype = mixture.roots.shape, mixture.roots.dtype
    dlogits, dmeans, dlogvars = outputs
    second, odd = dlogvars is not None, scattered(mu, logvar)
    block = blocks(dtype, "components", rows, components, scattered=odd)
    component_blocks, part = cdiv(components, block["COMPONENTS"]), padded_columns * padded
    partial = part * (1 + (logvars is not None)) * dtype.itemsize  # whatever is wanted, so that it has the same bits
    length, parts = split(rows, block["ROWS"], component_blocks, partial, 2 * mu.numel() * mu.itemsize)
    counts = torch.empty((parts, padded), dtype=dtype, device=device)
    sums = torch.empty((1 + second, parts, padded_columns, padded), dtype=dtype, device=device)
    squared, shape = sums[1] if second else None, (columns, components, padded)
    launch(
        kl_gmm_bounds_components_kernel, (component_blocks * parts,),
        *given, mu, logvar, *mixture, counts, sums[0], squared, rows, shape,
        mu.stride(), logvar.stride(), given[0].stride(0), given[1].stride(0), part, length, component_blocks,
        TAIL=odd == "tail", DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    count = torch.empty(components, dtype=dtype, device=device)
    first = torch.empty_like(means) if dmeans is None else dmeans
    squares = dlogvars
    if dlogvars is not None and dlogvars.shape != means.shape:  # summed afterwards
        squares = torch.empty(means.shape, dtype=dtype, device=device)
    finish_parts((counts, sums[0], squared), (first, squares, count), mixture.roots, parts, shape, "gradient")
    if dlogits is not None:
        count += torch.softmax(logits[0].to(dtype), 0) * (given[0].sum(dtype=dtype) + given[1].sum(dtype=dtype))
        dlogits.copy_(count)
    if dlogvars is not None and squares is not None and squares is not dlogvars:
        dlogvars.copy_(squares.sum_to_size(dlogvars.shape))
