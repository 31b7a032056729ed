"""Gradients by components of the ops on a mixture that all rows share, as moments weighted by responsibilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE, exp, two_parts, weighted
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import OLD_COMPILER, cdiv, present, registers
from fastkl.kernels.mixture._mixture import (
    finite_spread,
    four,
    joint_tile,
    load_rows,
    of_rows,
    own_index,
    quads,
)
from fastkl.kernels.mixture._mixture_prepare import Prepared
from fastkl.kernels.mixture._mixture_rows import Given, given_weights, row_launch_arguments, stacked, summed
from fastkl.kernels.mixture._mixture_tiles import blocks, scattered, split

FINISH = {"COMPONENTS": 32, "COLUMNS": 32, **(registers(255) if OLD_COMPILER else {})}


@triton.jit
def summed_both(x, y):
    """`summed` of both at once."""
    x = stacked(stacked(x[0], x[1]), stacked(x[2], x[3]))
    y = stacked(stacked(y[0], y[1]), stacked(y[2], y[3]))
    both = tl.sum(stacked(x, y), axis=4)
    return tl.split(tl.reshape(tl.permute(both, [4, 3, 1, 2, 0]), [both.shape[4] * both.shape[3], 4, 2]))


@triton.jit
def finished(first, second, count, s, KIND: tl.constexpr):
    """Sums over all rows in the form of KIND: "gradient", "convolved" (gradient), or "moments" of the differences."""
    if KIND == "gradient":
        return first * s, 0.5 * (second - count)
    elif KIND == "convolved":
        return first, second * (0.5 * s)
    else:
        return first / s, second / (s * s)


@triton.jit
def gmm_components_kernel(
    dlp, lp, dlog_r, log_r, z, logvar, logits, normaliser, constants, roots, means, counts, sums,
    squared, rows, logit_rows, shape, z_strides, logvar_strides, logits_strides, dlp_stride, dlog_r_strides,
    sums_strides, squared_strides, part_stride, rows_per_program, component_blocks,
    FORM: tl.constexpr, GIVEN: tl.constexpr, TAIL: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    COMPONENTS: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Per part of the rows: counts [K] = sum w, sums [K, D] = sum w t and squared [K, D] = sum w t^2 (or None), t the
    scaled difference. Convolved: sum w t u and sum w (t^2 u^2 - u), u the precision; expected: sum w (t^2 + scaled
    variance of q). With a KIND the rows have one part, and the last two are `finished`."""
    part = tl.program_id(0) // component_blocks
    start_component = tl.program_id(0) % component_blocks * COMPONENTS
    lanes = own_index(COMPONENTS, LANES)
    component = start_component + tl.arange(0, COMPONENTS)
    quad = tl.arange(0, 4)
    steps = (z_strides[1] * 4, logvar_strides[1] * 4)
    first_row = part * rows_per_program
    end = tl.minimum(first_row + rows_per_program, rows)
    sums += part.to(tl.int64) * part_stride
    sums_start = quads(sums, component, sums_strides)
    if squared is not None:
        squared += part.to(tl.int64) * part_stride
        squared_start = quads(squared, component, squared_strides)
    count = tl.zeros([COMPONENTS], dtype=DTYPE)
    for start in range(first_row, end, ROWS):
        index = start + tl.arange(0, ROWS)
        row = tl.minimum(index, rows - 1).to(tl.int64)  # past the end the last row, with weight 0
        z_at, logvar_at = quads(z, row, z_strides), None
        if logvar is not None:
            logvar_at = quads(logvar, row, logvar_strides)
        gradient = tl.load(dlp + row * dlp_stride, mask=index < rows, other=0.0).to(DTYPE)
        if GIVEN:
            weight = given_weights(
                dlog_r, log_r, gradient, row, start_component + lanes, shape[1], dlog_r_strides, False, TERMS, LANES,
                DTYPE,
            )  # fmt: skip
            weight = tl.where(of_rows(index < rows, False, TERMS, LANES), weight, 0.0)
        else:
            value, rest = two_parts(tl.load(lp + row), DTYPE)
            joint = joint_tile(
                z_at, logvar_at, logits, normaliser, constants, roots, means, row % logit_rows,
                start_component, shape, steps, logits_strides, FORM, TAIL, False, ROWS, COMPONENTS, TERMS, LANES, DTYPE,
            )  # fmt: skip
            value, rest = of_rows(value, False, TERMS, LANES), of_rows(rest, False, TERMS, LANES)
            weight = weighted(of_rows(gradient, False, TERMS, LANES), exp(joint - value - rest))
        count += tl.reshape(tl.permute(tl.sum(tl.sum(weight, axis=1), axis=1), [1, 0]), [COMPONENTS])
        roots_at, means_at, sums_at = roots + start_component, means + start_component, sums_start
        if squared is not None:
            squared_at = squared_start
        for d in range(0, shape[0], 4):
            zs = four(load_rows(z_at, d, shape[0], TAIL, DTYPE), ROWS)
            z_at += steps[0]
            if FORM != "point":
                vs = four(finite_spread(logvar_at, d, shape[0], FORM, TAIL, DTYPE), ROWS)
                logvar_at += steps[1]
            firsts, seconds = (), ()  # mypy lets no tuple grow
            for i in tl.static_range(4):
                s = tl.load(roots_at + lanes)
                t = of_rows(zs[i], False, TERMS, LANES) - tl.load(means_at + lanes)
                if FORM == "convolved":
                    u = 1.0 / (s + of_rows(vs[i], False, TERMS, LANES))
                    t *= u
                else:
                    t *= s
                moment = weight * t
                firsts += (tl.sum(moment, axis=1),)  # type: ignore[assignment]
                if squared is not None:
                    moment *= t
                    if FORM == "convolved":
                        moment -= weight * u
                    if FORM == "expected":
                        sigma = of_rows(vs[i], False, TERMS, LANES)
                        moment += weight * s * sigma * s * sigma  # this order gives 0 for a weight of 0
                    seconds += (tl.sum(moment, axis=1),)  # type: ignore[assignment]
                roots_at += shape[2]
                means_at += shape[2]
            mask = (component < shape[1])[:, None] & (d + quad < shape[0])[None, :]
            again = mask & (start + tl.arange(0, 1) > first_row)[:, None]  # the first block starts from 0
            if squared is None:
                first = summed(firsts)
                second = first
            else:
                first, second = summed_both(firsts, seconds)
                second += tl.load(squared_at, again, other=0.0)
            first += tl.load(sums_at, again, other=0.0)
            if KIND is not None:  # noqa: SIM102 (a compile-time condition; the next is not)
                if start + ROWS >= end:
                    factor = tl.load(roots + (d + quad).to(tl.int64)[None, :] * shape[2] + component[:, None])
                    first, second = finished(first, second, count[:, None], factor, KIND)
            tl.store(sums_at, first, mask)
            sums_at += sums_strides[1] * 4
            if squared is not None:
                tl.store(squared_at, second, mask)
                squared_at += squared_strides[1] * 4
    tl.store(counts + part.to(tl.int64) * shape[2] + component, count)


@triton.jit
def gmm_finish_kernel(
    counts, sums, squared, roots, first_out, second_out, count_out, parts, shape, part_stride, column_blocks,
    first_strides, second_strides,
    KIND: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the parts; [K, D] outputs."""
    component = tl.program_id(0) // column_blocks * COMPONENTS + tl.arange(0, COMPONENTS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (component < shape[1])[None, :] & (column < shape[0])[:, None]
    at = column.to(tl.int64)[:, None] * shape[2] + component[None, :]
    count = tl.zeros([COMPONENTS], dtype=DTYPE)
    first = tl.zeros([COLUMNS, COMPONENTS], dtype=DTYPE)
    second = tl.zeros([COLUMNS, COMPONENTS], dtype=DTYPE)
    real = component < shape[1]
    for _ in range(parts):
        count += tl.load(counts + component, real, other=0.0)
        first += tl.load(sums + at, mask, other=0.0)
        counts += shape[2]
        sums += part_stride
        if squared is not None:
            second += tl.load(squared + at, mask, other=0.0)
            squared += part_stride
    s = tl.load(roots + at, mask, other=1.0)  # neutral as a divisor
    first, second = finished(first, second, count[None, :], s, KIND)
    component, column = component.to(tl.int64), column.to(tl.int64)
    tl.store(first_out + component[None, :] * first_strides[0] + column[:, None] * first_strides[1], first, mask)
    if squared is not None:
        at = component[None, :] * second_strides[0] + column[:, None] * second_strides[1]
        tl.store(second_out + at, second, mask)
    if tl.program_id(0) % column_blocks == 0:
        tl.store(count_out + component, count, real)


def finish_parts(
    sums: Sequence[Tensor | None], outputs: tuple[Tensor, Tensor | None, Tensor], roots: Tensor, parts: int,
    shape: tuple[int, ...], kind: str,
) -> None:  # fmt: skip
    """Launch gmm_finish_kernel: (counts, sums, squared) of all parts to (first, second, count)."""
    first, second, _ = outputs
    column_blocks = max(1, cdiv(shape[0], FINISH["COLUMNS"]))
    launch(
        gmm_finish_kernel, (cdiv(shape[1], FINISH["COMPONENTS"]) * column_blocks,), *sums, roots, *outputs, parts,
        shape, roots.numel(), column_blocks, first.stride()[1:], (0, 0) if second is None else second.stride()[1:],
        KIND=kind, DTYPE=TRITON_DTYPE[roots.dtype], enable_fp_fusion=True, **FINISH,
    )  # fmt: skip


def by_components(
    given: Given, z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None,
    mixture: Prepared, form: str, kind: str, first_out: Tensor | None, second_out: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write to first_out [1, K, D] and second_out, in the shape of logvars: gradients, or moments; None is not wanted.
    Returns counts [K]."""
    rows, columns = z.shape
    components, padded = means.shape[1], mixture.padded
    padded_columns, dtype, device = mixture.roots.shape[0], mixture.roots.dtype, z.device
    own, odd = logits.shape[0] > 1, scattered(z, logvar)
    block = blocks(
        dtype, form, "components", rows, components, own=own, scattered=odd, given=given[2] is not None
    )  # fmt: skip
    component_blocks = cdiv(components, block["COMPONENTS"])
    part = padded_columns * padded
    # Also if dlogvars is not wanted, so that dmeans has the same bits.
    both = second_out is not None or logvars is not None
    partial = part * (1 + both) * dtype.itemsize
    length, parts = split(rows, block["ROWS"], component_blocks, partial, z.numel() * z.itemsize)
    first = torch.empty_like(means) if first_out is None else first_out
    second = second_out
    if second_out is not None and second_out.shape != means.shape:  # summed afterwards
        second = torch.empty(means.shape, dtype=dtype, device=device)
    outputs = present((first, second))
    # A single part's sums go on in the outputs, if these are not rounded on the way.
    direct = parts == 1 and (rows <= block["ROWS"] or all(output.dtype == dtype for output in outputs))
    counts = torch.empty((parts, padded), dtype=dtype, device=device)
    sums, sums_strides = [*outputs, None][:2], [output.stride()[1:] for output in outputs]
    if not direct:
        sums[: len(outputs)] = torch.empty((len(outputs), parts, padded_columns, padded), dtype=dtype, device=device)
        sums_strides = [(1, padded)] * len(outputs)
    pointers, strides = row_launch_arguments(given, z, logvar, logits, mixture)
    shape = (columns, components, padded)
    launch(
        gmm_components_kernel, (component_blocks * parts,), *pointers, counts, *sums, rows, logits.shape[0], shape,
        *strides, *[*sums_strides, (0, 0)][:2], part, length, component_blocks, FORM=form,
        GIVEN=given[2] is not None, TAIL=odd == "tail", KIND=kind if direct else None, DTYPE=TRITON_DTYPE[dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    count = counts[0, :components]
    if not direct:
        count = torch.empty(components, dtype=dtype, device=device)
        finish_parts((counts, *sums), (first, second, count), mixture.roots, parts, shape, kind)
    if second_out is not None and second is not None and second is not second_out:
        dims = [dim for dim in (1, 2) if second_out.shape[dim] == 1]
        second_out.copy_(second.sum(dims, keepdim=True))
    return count
