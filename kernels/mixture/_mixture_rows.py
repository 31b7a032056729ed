"""Gradients by rows of the ops on a mixture that all rows share: of z, its log-variance, and per-row logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE, exp, two_parts, weighted
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, places, present, strides_of
from fastkl.kernels.mixture._mixture import (
    finite_spread,
    four,
    joint_tile,
    load_rows,
    of_rows,
    quads,
    term_index,
)
from fastkl.kernels.mixture._mixture_prepare import Prepared
from fastkl.kernels.mixture._mixture_tiles import blocks, scattered, split

# (dlp, lp, dlog_r, log_r), of which a call has the first two or three of them.
Given = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def given_weights(
    dlog_r, log_r, total, row, component, components, dlog_r_strides,
    BY_ROWS: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dlog_r - exp(log_r) total, 0 beyond the last component."""
    mask, component = component < components, component.to(tl.int64)
    at = of_rows(row * dlog_r_strides[0], BY_ROWS, TERMS, LANES) + component * dlog_r_strides[1]
    gradient = tl.load(dlog_r + at, mask, other=0.0).to(DTYPE)
    at = of_rows(row * components, BY_ROWS, TERMS, LANES) + component
    value = tl.load(log_r + at, mask, other=float("-inf")).to(DTYPE)
    return gradient - exp(value) * of_rows(total, BY_ROWS, TERMS, LANES)


@triton.jit
def stacked(x, y):
    """x and y along a new first dimension, which stays within a thread; a new last one would be split over threads."""
    if len(x.shape) == 3:
        return tl.permute(tl.join(x, y), [3, 0, 1, 2])
    elif len(x.shape) == 4:
        return tl.permute(tl.join(x, y), [4, 0, 1, 2, 3])
    else:
        return tl.permute(tl.join(x, y), [5, 0, 1, 2, 3, 4])


@triton.jit
def summed(x):
    """Four tiles, summed over the terms of each group [own, groups, LANES], as [rows or components, 4]."""
    x = tl.sum(stacked(stacked(x[0], x[1]), stacked(x[2], x[3])), axis=3)
    return tl.reshape(tl.permute(x, [3, 2, 0, 1]), [x.shape[3] * x.shape[2], 4])


@triton.jit
def gmm_rows_kernel(
    dlp, lp, dlog_r, log_r, z, logvar, logits, normaliser, constants, roots, means, dz, dlogvar, dlogits,
    rows, copies, shape, z_strides, logvar_strides, logits_strides, dlp_stride, dlog_r_strides, dz_strides,
    dlogvar_strides, dlogits_strides, dz_split_stride, dlogvar_split_stride, components_per_program, splits,
    FORM: tl.constexpr, GIVEN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr,
    TERMS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of z and logvar (per split), and of per-row logits.

    Each of the `rows` rows of logits serves `copies` rows of z, `rows` apart. The outputs accumulate the sums over
    components and copies; one program owns each element. With GIVEN the weights are dlog_r - exp(log_r) dlp.
    """
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    valid = index < rows
    index = tl.minimum(index, rows - 1)  # past the end the last row, not stored
    steps = (z_strides[1] * 4, logvar_strides[1] * 4)
    lanes = term_index(COMPONENTS, TERMS)
    first = split * components_per_program
    if dz is not None:
        dz += split.to(tl.int64) * dz_split_stride
    if dlogvar is not None:
        dlogvar += split.to(tl.int64) * dlogvar_split_stride
    if dlogits is not None:
        normal = of_rows(tl.load(normaliser + index), True, TERMS, LANES)
    for copy in range(copies):
        row = index.to(tl.int64) + copy * rows
        z_at, logvar_at = quads(z, row, z_strides), None
        if logvar is not None:
            logvar_at = quads(logvar, row, logvar_strides)
        gradient = tl.load(dlp + row * dlp_stride).to(DTYPE)
        if not GIVEN:
            value, rest = two_parts(tl.load(lp + row), DTYPE)
            value, rest = of_rows(value, True, TERMS, LANES), of_rows(rest, True, TERMS, LANES)
        for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
            component = start + lanes
            if GIVEN:
                weight = given_weights(
                    dlog_r, log_r, gradient, row, component, shape[1], dlog_r_strides, True, TERMS, LANES, DTYPE
                )  # fmt: skip
            else:
                joint = joint_tile(
                    z_at, logvar_at, logits, normaliser, constants, roots, means, index, start, shape,
                    steps, logits_strides, FORM, TAIL, True, ROWS, COMPONENTS, TERMS, LANES, DTYPE,
                )  # fmt: skip
                weight = weighted(of_rows(gradient, True, TERMS, LANES), exp(joint - value - rest))
            if dlogits is not None:
                inside = (component < shape[1]) & of_rows(valid, True, TERMS, LANES)
                column = tl.minimum(component, shape[1] - 1).to(tl.int64)  # past the end the last one, not stored
                out = of_rows(index.to(tl.int64) * dlogits_strides[0], True, TERMS, LANES) + column * dlogits_strides[1]
                change = weight
                if not GIVEN:
                    # The same address expression as in joint_tile, so that the compiler merges the two loads.
                    row_at = of_rows(index.to(tl.int64) * logits_strides[0], True, TERMS, LANES)
                    share = tl.load(logits + (row_at + column * logits_strides[1])).to(DTYPE) - normal
                    change -= of_rows(gradient, True, TERMS, LANES) * exp(share)
                change += tl.load(dlogits + out, copy + lanes * 0 > 0, other=0.0).to(DTYPE)  # the first starts from 0
                tl.store(dlogits + out, change, inside)
            if dz is not None:
                dz_at = quads(dz, row, dz_strides)
                roots_at, means_at = roots + start, means + start
                if dlogvar is not None:
                    dlogvar_at = quads(dlogvar, row, dlogvar_strides)
                    logvar_here = logvar_at
                z_here = z_at
                for d in range(0, shape[0], 4):
                    zs = four(load_rows(z_here, d, shape[0], TAIL, DTYPE), ROWS)
                    if FORM != "point":
                        spread = finite_spread(logvar_here, d, shape[0], FORM, TAIL, DTYPE)
                        vs = four(spread, ROWS)
                    sums, others = (), ()  # mypy lets no tuple grow
                    for i in tl.static_range(4):
                        s = tl.load(roots_at + lanes)
                        t = of_rows(zs[i], True, TERMS, LANES) - tl.load(means_at + lanes)
                        roots_at += shape[2]
                        means_at += shape[2]
                        if FORM == "convolved":
                            u = 1.0 / (s + of_rows(vs[i], True, TERMS, LANES))
                            t *= u
                            moment = weight * t
                            others += (tl.sum(moment * t - weight * u, axis=1),)  # type: ignore[assignment]
                            sums += (tl.sum(moment, axis=1),)  # type: ignore[assignment]
                        else:
                            t *= s
                            scaled = weight * s
                            sums += (tl.sum(scaled * t, axis=1),)  # type: ignore[assignment]
                            if FORM == "expected":
                                others += (tl.sum(scaled * (s * of_rows(vs[i], True, TERMS, LANES)), axis=1),)  # type: ignore[assignment]
                    mask = valid[:, None]
                    if TAIL:
                        mask = mask & (d + tl.arange(0, 4) < shape[0])[None, :]
                    old = mask & (start + tl.arange(0, 1) > first)[:, None]  # the first tile starts from 0
                    before = tl.load(dz_at, old, other=0.0).to(DTYPE)
                    tl.store(dz_at, before - summed(sums), mask)
                    dz_at += dz_strides[1] * 4
                    z_here += steps[0]
                    if dlogvar is not None:
                        half = 0.5 if FORM == "convolved" else -0.5
                        before = tl.load(dlogvar_at, old, other=0.0).to(DTYPE)
                        tl.store(dlogvar_at, before + weighted(summed(others), spread) * half, mask)
                        dlogvar_at += dlogvar_strides[1] * 4
                        logvar_here += steps[1]


def row_launch_arguments(
    given: Given, z: Tensor, logvar: Tensor | None, logits: Tensor, mixture: Prepared
) -> tuple[tuple, tuple]:
    """(pointers, strides) up to the outputs, for both kernels; logits are None where all rows share them."""
    dlp, _, dlog_r, _ = given
    strides = (z.stride(), strides_of(logvar), logits.stride(), dlp.stride(0), strides_of(dlog_r))
    pointers = (*given, z, logvar, None if logits.shape[0] == 1 else logits, *mixture)
    return pointers, strides


def by_rows(
    given: Given, z: Tensor, logvar: Tensor | None, logits: Tensor, components: int, mixture: Prepared, form: str,
    outputs: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Write (dz, dlogvar, dlogits), the last for logits per row; None is not wanted."""
    rows, columns = z.shape
    logit_rows, dtype = logits.shape[0], mixture.roots.dtype
    owners = logit_rows if logit_rows > 1 else rows
    odd = scattered(z, logvar)
    block = blocks(
        dtype, form, "rows", owners, components, own=logit_rows > 1, scattered=odd, given=given[2] is not None
    )  # fmt: skip
    row_blocks = cdiv(owners, block["ROWS"])
    *of_data, dlogits = outputs
    if present(of_data):
        of_data = places(of_data, (z, logvar))
    partial = rows * columns * dtype.itemsize * len(present(of_data))
    length, splits = split(components, block["COMPONENTS"], row_blocks, partial, z.numel() * z.itemsize)
    written = [*of_data, dlogits]
    for i, output in enumerate(written):
        # What is added to more than once is added up in the compute dtype.
        again = (splits > 1 or components > block["COMPONENTS"]) if i < 2 else rows > owners
        if output is not None and ((i < 2 and splits > 1) or (again and output.dtype != dtype)):
            shape = (splits, *output.shape) if i < 2 else output.shape
            written[i] = torch.empty(shape, dtype=dtype, device=z.device)
    pointers, strides = row_launch_arguments(given, z, logvar, logits, mixture)
    split_strides = [w.stride(0) if w is not None and w.dim() == 3 else 0 for w in written[:2]]
    launch(
        gmm_rows_kernel, (row_blocks * splits,), *pointers, *written, owners, rows // owners,
        (columns, components, mixture.padded), *strides, *(strides_of(w)[-2:] for w in written), *split_strides,
        length, splits, FORM=form, GIVEN=given[2] is not None, TAIL=odd == "tail",
        DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    for output, found in zip(outputs, written):
        if output is not None and found is not None and output is not found:
            output.copy_(found.sum(0) if found.dim() == 3 else found)
