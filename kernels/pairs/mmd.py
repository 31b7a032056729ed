"""Squared MMD and its gradient by direct differences: tiles of rows x others, as in the mixture kernels by rows.

Each pair of samples is one launch: (x, x), (x, y), (y, y), and (y, x) if y requires a gradient. A program has some rows
and a share of the others. One pass over the dimensions gives the distances, for all scales, and a second pass the
gradient; partial sums are added in a fixed order. Without a gradient, x with itself takes half the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels import _launch
from fastkl.kernels._device import proportion
from fastkl.kernels._layout import cdiv, compute_dtype, next_power_of_2, registers
from fastkl.kernels.mixture._mixture import four, load_rows, of_rows, own_index, quads, term_index
from fastkl.kernels.mixture._mixture_prepare import PAD, STEP
from fastkl.kernels.mixture._mixture_rows import summed
from fastkl.kernels.mixture._mixture_tiles import scattered, split


def blocks(dtype: torch.dtype, others: int, *, gradient: bool) -> dict[str, int]:
    """A tile of rows x others: a thread has two rows and 16 others, over which sums are, with a gradient 8; fewer in
    float64. Several warps share the rows, and so the partial gradients' traffic."""
    terms = 16 // (1 + gradient) // (1 + (dtype == torch.float64))
    owned = 1 if dtype == torch.float64 else 2
    groups = min(4, next_power_of_2(cdiv(others, terms)))
    return {
        "ROWS": owned * 32,
        "OTHERS": terms * groups,
        "TERMS": terms,
        "LANES": 32,
        "num_warps": groups,
        **registers(255),
    }


def beside(points: Tensor, dtype: torch.dtype) -> Tensor:
    """[D, N], padded with zeros to whole tiles: loads in the inner loops need no mask."""
    rows, columns = points.shape
    out = torch.zeros((cdiv(columns, STEP) * STEP, cdiv(rows, PAD) * PAD), dtype=dtype, device=points.device)
    out[:columns, :rows] = points.T
    return out


@triton.jit
def chosen(index, NUMBERS: tl.constexpr, DTYPE: tl.constexpr):
    """NUMBERS[index] in a rolled loop: an unrolled one would need registers for the temporaries of all numbers."""
    number = tl.full([1, 1, 1, 1], NUMBERS[0], dtype=DTYPE)
    for i in tl.static_range(1, len(NUMBERS)):
        number = tl.where(index == i, tl.full([1, 1, 1, 1], NUMBERS[i], dtype=DTYPE), number)
    return number


@triton.jit
def kernel_terms(t, KERNEL: tl.constexpr, SCALES: tl.constexpr, INVERSES: tl.constexpr):
    """The kernel and its derivative at t = d^2 / (2 D)."""
    value, slope = tl.zeros_like(t), tl.zeros_like(t)
    for index in range(len(SCALES)):
        if KERNEL == "imq":
            s = chosen(index, SCALES, t.dtype)
            r = 1.0 / (t + s)
            term = r * s
            value += term
            slope -= term * r
        else:
            inverse = chosen(index, INVERSES, t.dtype)
            term = proportion(t * -inverse)
            value += term
            slope -= term * inverse
    return value, slope


@triton.jit
def mmd_kernel(
    z, others, sums, dz, rows, count, shape, z_strides, dz_stride, split_stride, per_program, splits,
    HALF: tl.constexpr, KERNEL: tl.constexpr, SCALES: tl.constexpr, INVERSES: tl.constexpr, SAME: tl.constexpr,
    SELF: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, OTHERS: tl.constexpr, TERMS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A program's sum of k(z_i, z_j) over its pairs, and per split dz_i = sum_j k'(z_i, z_j) (z_i - z_j).

    shape is (dimensions, padded others). SAME: the others are z itself; SELF then includes the pairs of a point with
    itself, and without dz pairs i < j count twice.
    """
    columns, padded = shape
    dtype: tl.constexpr = others.dtype.element_ty
    share = tl.program_id(0) % splits
    first_row = tl.program_id(0) // splits * ROWS
    index = first_row + tl.arange(0, ROWS)
    valid = index < rows
    row = tl.minimum(index, rows - 1).to(tl.int64)  # past the end the last row, neither counted nor stored
    z_start = quads(z, row, z_strides)
    step = z_strides[1] * 4
    own = first_row + own_index(ROWS, LANES)
    first = share * per_program
    end = tl.minimum(first + per_program, count)
    HALVED: tl.constexpr = SAME and dz is None
    if HALVED:
        first = tl.maximum(first, first_row // OTHERS * OTHERS)
    if dz is not None:
        dz_start = quads(dz + share.to(tl.int64) * split_stride, row, (dz_stride, 1))
    total = tl.zeros([ROWS // LANES, OTHERS // TERMS, LANES], dtype=dtype)
    for start in range(first, end, OTHERS):
        lanes = term_index(OTHERS, TERMS)
        z_at, others_at = z_start, others + start
        t = tl.zeros([ROWS // LANES, TERMS, OTHERS // TERMS, LANES], dtype=dtype)
        for d in range(0, columns, 4):
            zs = four(load_rows(z_at, d, columns, TAIL, dtype), ROWS)
            z_at += step
            for i in tl.static_range(4):
                u = of_rows(zs[i], True, TERMS, LANES) - tl.load(others_at + lanes)
                others_at += padded
                t += u * u
        value, slope = kernel_terms(t * HALF, KERNEL, SCALES, INVERSES)
        other = start + lanes
        inside = (other < end) & (own < rows)
        if SAME and not SELF:
            inside = inside & (other != own)
        if HALVED:
            inside = inside & (other >= own)
            value += tl.where(other > own, value, 0.0)
        total += tl.sum(tl.where(inside, value, 0.0), axis=1)
        if dz is not None:
            slope = tl.where(inside, slope, 0.0)
            z_at, others_at, dz_at = z_start, others + start, dz_start
            for d in range(0, columns, 4):
                zs = four(load_rows(z_at, d, columns, TAIL, dtype), ROWS)
                z_at += step
                parts = ()  # mypy lets no tuple grow
                for i in tl.static_range(4):
                    u = of_rows(zs[i], True, TERMS, LANES) - tl.load(others_at + lanes)
                    others_at += padded
                    parts += (tl.sum(slope * u, axis=1),)  # type: ignore[assignment]
                mask = valid[:, None] & (d + tl.arange(0, 4) < columns)[None, :]
                old = mask & (start + tl.arange(0, 1) > first)[:, None]  # the first tile starts from 0
                tl.store(dz_at, tl.load(dz_at, old, other=0.0) + summed(parts), mask)
                dz_at += 4
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.sum(total, axis=2), axis=1), axis=0))


def launch(
    z: Tensor, others: Tensor, count: int, kernel: str, scales: Sequence[float], *,
    same: bool, self_pairs: bool, gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(sum over pairs, sum_j k' (z_i - z_j) or None) of z [N, D] and others [D, count], padded."""
    (rows, columns), dtype = z.shape, others.dtype
    odd = scattered(z)
    block = blocks(dtype, count, gradient=gradient)
    row_blocks = cdiv(rows, block["ROWS"])
    per_program, splits = split(count, block["OTHERS"], row_blocks, rows * columns * dtype.itemsize * gradient)
    sums = torch.empty(row_blocks * splits, dtype=dtype, device=z.device)
    dz = torch.empty((splits, rows, columns), dtype=dtype, device=z.device) if gradient else None
    _launch.launch(
        mmd_kernel, (row_blocks * splits,),
        z, others, sums, dz, rows, count, (columns, others.shape[1]), z.stride(), columns, rows * columns, per_program,
        splits, HALF=0.5 / columns, KERNEL=kernel, SCALES=tuple(scales), INVERSES=tuple(1 / s for s in scales),
        SAME=same, SELF=self_pairs, TAIL=odd == "tail", enable_fp_fusion=True, **block,
    )  # fmt: skip
    return sums.sum(dtype=torch.float64), None if dz is None else dz.sum(0)


def between(x: Tensor, y: Tensor, kernel: str, scales: Sequence[float], dx: bool) -> list[Tensor]:
    """[sum_ij k(x_i, y_j), its gradient in x if dx]."""
    others = beside(y, compute_dtype([x, y]))
    value, gradient = launch(x, others, len(y), kernel, scales, same=False, self_pairs=True, gradient=dx)
    return [value] if gradient is None else [value, gradient / x.shape[1]]


def fwd(x: Tensor, y: Tensor, kernel: str, scales: Sequence[float], unbiased: bool, dx: bool, dy: bool) -> list[Tensor]:
    points, wanted, dtype = (x, y), (dx, dy), compute_dtype([x, y])
    counts = [len(z) for z in points]
    others = [beside(z, dtype) for z in points]
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    gradients = []
    for a, b in ((0, 1), (1, 0)):
        if counts[a] == 0:
            continue
        count = counts[a]
        own = 1 / (count * (count - 1) if unbiased else count * count)
        settings = (kernel, scales)
        value, gradient = launch(
            points[a], others[a], count, *settings, same=True, self_pairs=not unbiased, gradient=wanted[a]
        )
        total += own * value
        if gradient is not None:
            gradient *= own
        if counts[b] and (a == 0 or wanted[a]):
            mixed = -1 / (count * counts[b])
            value, part = launch(
                points[a], others[b], counts[b], *settings, same=False, self_pairs=True, gradient=wanted[a]
            )
            if a == 0:
                total += 2 * mixed * value
            if gradient is not None and part is not None:
                gradient += mixed * part
        if gradient is not None:
            gradients.append(gradient * (2 / x.shape[1]))
    return [total, *gradients]
