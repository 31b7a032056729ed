"""Gumbel-Softmax: 1R + 1W forward, 2R + 1W backward. The noise comes from Philox in registers and is never stored.

Logits are [outer, classes, inner]. With AXIS 1 (inner is 1) a tile is ROWS distributions by COLUMNS classes, with AXIS
0 ROWS classes by COLUMNS distributions; columns are contiguous in the noise, and mostly in memory. Classes that do not
fit one tile take two passes, which read the logits twice: first statistics, split over programs, then the result.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import LN2, TRITON_DTYPE, finite
from fastkl.kernels._launch import Plan, planned
from fastkl.kernels._layout import (
    PROGRAMS,
    SPILLS_A_FEW,
    View,
    cdiv,
    compute_dtype,
    next_power_of_2,
    registers,
    share,
    view,
)
from fastkl.kernels._noise import log
from fastkl.kernels.categorical._gumbel_softmax import first_maximum, offsets, perturbed, temperature, tile
from fastkl.kernels.categorical._statistics import combine, statistics

# Elements of a tile that holds all classes, of one that does not, and of a tile of short rows.
WHOLE, PART, SHORT = 8192, 2048, 512
# Programs that share a distribution at most; each reads what all of them found.
SPLITS = 32


def blocks(classes: int, inner: int, wide: bool, odd: bool) -> tuple[dict[str, int], bool]:
    """(tile, whether it holds all classes); its columns are a multiple of 4, one Philox call each."""
    whole, part, short = (size // 2 for size in (WHOLE, PART, SHORT)) if wide else (WHOLE, PART, SHORT)
    if inner == 1:
        columns = max(4, next_power_of_2(classes + 3 * odd))
        fits = columns <= whole
        rows, columns = (max(1, short // columns), columns) if fits else (1, part)
    else:
        if odd:  # a Philox call for each element takes registers
            whole, part, short = whole // 2, part // 2, short // 2
        rows, columns = next_power_of_2(classes), max(4, min(64, next_power_of_2(inner)))
        narrow = min(columns, max(16, short // rows))
        fits = rows * narrow <= whole
        rows, columns = (rows, narrow) if fits else (part // columns, columns)
    warps = max(1, rows * columns // (256 if wide else 512))  # 16 elements a thread: fewer shuffles than with 8
    held = {} if fits else registers(255)
    held = registers(128) if fits and wide and SPILLS_A_FEW else held
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, **held}, fits


@triton.jit
def gumbel_softmax_fwd_kernel(
    logits, y, tau, seed, stream, found, found_third, shape, strides, y_strides, column_blocks, classes_per_program,
    splits, count, HARD: tl.constexpr, TENSOR: tl.constexpr, AXIS: tl.constexpr, ODD: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """y; without `found` one tile holds all classes."""
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    scale, _inverse, limit = temperature(tau, TENSOR, DTYPE)
    key = tl.load(seed)
    begin = split * classes_per_program
    if found is not None:
        distribution = tile(block, begin, shape, column_blocks, AXIS, ODD, ROWS, COLUMNS)[4]
        top, total, best = combine(found, found_third, distribution, count, scale, splits, AXIS, SPLITS, True)
    last = tl.minimum(begin + classes_per_program, shape[1] + 3 if AXIS == 1 and ODD else shape[1])
    for start in range(begin, last if found is not None else 1, COLUMNS if AXIS == 1 else ROWS):
        line, first, column, index, _own, mask = tile(block, start, shape, column_blocks, AXIS, ODD, ROWS, COLUMNS)
        at = offsets(block, line, column, index, strides, column_blocks, AXIS)
        values = perturbed(logits + at, mask, key, stream, line, first, column, shape, AXIS, ODD, ROWS, COLUMNS, DTYPE)
        if found is None:
            top = finite(tl.max(values, axis=AXIS, keep_dims=True))
        weight = tl.exp2((values - top) * scale)
        if found is None:
            total = tl.sum(weight, axis=AXIS, keep_dims=True)
        result = weight * (1.0 / tl.where(total == 0.0, 1.0, total))
        if HARD or TENSOR:
            if found is None:
                best = first_maximum(values, index, top, AXIS)
            one_hot = tl.where(index == best, 1.0, 0.0) + total * 0.0  # keeps NaN of a logit or tau
            result = one_hot if HARD else tl.where(limit, one_hot, result)
        tl.store(y + offsets(block, line, column, index, y_strides, column_blocks, AXIS), result, mask)


@triton.jit
def gumbel_softmax_bwd_kernel(
    dy, logits, dlogits, dtau, tau, seed, stream, found, found_third, shape, dy_strides, strides, dlogits_strides,
    column_blocks, classes_per_program, splits, count, SOFT: tl.constexpr, TENSOR: tl.constexpr, AXIS: tl.constexpr,
    ODD: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dx = y (dy - sum y dy), dlogits = dx / tau, dtau = -sum dx ln y / tau; with SOFT, `logits` is y, and the division
    by its sum removes its rounding error."""
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    scale, inverse, _limit = temperature(tau, TENSOR, DTYPE)
    key = tl.load(seed)
    begin = split * classes_per_program
    if found is not None:
        distribution = tile(block, begin, shape, column_blocks, AXIS, ODD, ROWS, COLUMNS)[4]
        top, total, dot = combine(found, found_third, distribution, count, scale, splits, AXIS, SPLITS, False)
    if dtau is not None:
        tau_sum = tl.zeros([ROWS, COLUMNS], DTYPE)
    last = tl.minimum(begin + classes_per_program, shape[1] + 3 if AXIS == 1 and ODD else shape[1])
    for start in range(begin, last if found is not None else 1, COLUMNS if AXIS == 1 else ROWS):
        line, first, column, index, _own, mask = tile(block, start, shape, column_blocks, AXIS, ODD, ROWS, COLUMNS)
        at = offsets(block, line, column, index, strides, column_blocks, AXIS)
        dy_at = offsets(block, line, column, index, dy_strides, column_blocks, AXIS)
        d = tl.load(dy + dy_at, mask, other=0.0).to(DTYPE)  # masked entries have weight 0
        if SOFT:
            weight = tl.load(logits + at, mask, other=0.0).to(DTYPE)  # a weight of 0
        else:
            values = perturbed(
                logits + at, mask, key, stream, line, first, column, shape, AXIS, ODD, ROWS, COLUMNS, DTYPE
            )
            if found is None:
                top = finite(tl.max(values, axis=AXIS, keep_dims=True))
            weight = tl.exp2((values - top) * scale)
        if found is None:
            total = tl.sum(weight, axis=AXIS, keep_dims=True)
            dot = tl.sum(weight * d, axis=AXIS, keep_dims=True)
        norm = 1.0 / tl.where(total == 0.0, 1.0, total)
        dx = weight * norm * (d - dot * norm)
        at = offsets(block, line, column, index, dlogits_strides, column_blocks, AXIS)
        tl.store(dlogits + at, dx * inverse, mask)
        if dtau is not None:
            if not SOFT:
                logarithm = (values - top) * (scale * LN2)
            else:
                share = tl.where(weight > 0.0, weight * norm, 1.0)
                logarithm = tl.log(share) if share.dtype == tl.float64 else log(share)
            tau_sum += tl.where(weight > 0.0, dx * logarithm, 0.0)
    if dtau is not None:
        tl.store(dtau + tl.program_id(0), -inverse * tl.sum(tau_sum))


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Shared by both directions: the three dimensions, the tile, and the programs' shares."""

    shape: tuple[int, int, int]
    whole: bool  # one tile holds all classes
    splits: int
    grid: tuple[int, ...]
    numbers: tuple[int, ...]
    options: dict[str, Any]

    @property
    def count(self) -> int:
        return self.numbers[-1]

    def view(self, tensor: Tensor) -> Tensor:
        """[outer, classes, inner]; a copy where a view needs more than one stride for the dimensions on either side."""
        return tensor.reshape(self.shape)


@planned
def work_of(tensor: View, dim: int, tensor_tau: bool, noisy: bool = True) -> Work:
    dtype = compute_dtype([tensor])
    shape = (tensor.shape[:dim].numel(), tensor.shape[dim], tensor.shape[dim + 1 :].numel())
    outer, classes, inner = shape
    wide, axis = dtype == torch.float64, int(inner == 1)
    odd = noisy and (classes if axis else inner) % 4 != 0  # lines begin anywhere in a Philox call
    block, whole = blocks(classes, inner, wide, odd)
    column_blocks = 1 if axis else cdiv(inner, block["COLUMNS"])
    units = cdiv(outer, block["ROWS"]) if axis else outer * column_blocks
    step, splits = block["COLUMNS" if axis else "ROWS"], 1
    classes_per_program = step
    if not whole:
        # What the splits found is read by each of them: a tenth of the logits at most.
        programs = min(SPLITS, math.isqrt(classes // 24), PROGRAMS // max(1, units))
        classes_per_program, splits = share(classes + 3 * (odd and axis), step, programs)
    numbers = (column_blocks, classes_per_program, splits, outer * inner)
    options = {"TENSOR": tensor_tau, "AXIS": axis, "ODD": odd, "DTYPE": TRITON_DTYPE[dtype], "enable_fp_fusion": True}
    return Work(shape, whole, splits, (units * splits,), numbers, options | block)


def finish(tensor: Tensor, written: Tensor) -> Tensor:
    """`tensor`, of which `written` is the view or the copy."""
    return tensor if written.data_ptr() == tensor.data_ptr() else tensor.copy_(written.view(tensor.shape))


def temperature_of(tau: Tensor | None, constant: float, tensor: Tensor) -> Tensor | float:
    """tau, or of a number 1 / tau, which may change at every call."""
    if tau is not None:
        return tau
    if compute_dtype([tensor]) == torch.float64:  # a number would be passed in float32
        return torch.full((), constant, dtype=torch.float64, device=tensor.device)
    return 1 / max(constant, torch.finfo(torch.float32).tiny)


def fwd(logits: Tensor, tau: Tensor | None, seed: Tensor, constant: float, hard: bool, dim: int, stream: int) -> Tensor:
    hard = hard or (tau is None and constant == 0)
    y = torch.empty_like(logits)
    if y.numel() == 0:
        return y
    temperature = temperature_of(tau, constant, logits)
    work = work_of(view(logits), dim, isinstance(temperature, Tensor))
    x, out = work.view(logits), work.view(y)
    plan = plan_fwd(work, x.stride(), out.stride(), hard)
    plan.launch(x, out, temperature, seed, stream, *statistics(work, x, None, temperature, seed, stream, False))
    return finish(y, out)


@planned
def plan_fwd(work: Work, strides: tuple[int, ...], y_strides: tuple[int, ...], hard: bool) -> Plan:
    return Plan(
        gumbel_softmax_fwd_kernel, work.grid, work.shape, strides, y_strides, *work.numbers,
        HARD=hard, SPLITS=next_power_of_2(work.splits), **work.options,
    )  # fmt: skip


def bwd(
    dy: Tensor, y: Tensor, logits: Tensor | None, tau: Tensor | None, seed: Tensor, dlogits: Tensor,
    dtau: Tensor | None, constant: float, hard: bool, dim: int, stream: int,
) -> None:  # fmt: skip
    like, soft = (y, True) if logits is None else (logits, False)
    if like.numel() == 0 or (tau is None and constant == 0):
        dlogits.zero_()
        if dtau is not None:
            dtau.zero_()
        return
    temperature = temperature_of(tau, constant, like)
    work = work_of(view(like), dim, isinstance(temperature, Tensor), not soft)
    x, d, out = work.view(like), work.view(dy), work.view(dlogits)
    parts = None if dtau is None else torch.empty(work.grid, dtype=compute_dtype([like]), device=like.device)
    plan = plan_bwd(work, d.stride(), x.stride(), out.stride(), soft)
    found = statistics(work, x, d, temperature, seed, stream, soft)
    plan.launch(d, x, out, parts, temperature, seed, stream, *found)
    finish(dlogits, out)
    if dtau is not None and parts is not None:
        dtau.copy_(parts.sum())


@planned
def plan_bwd(
    work: Work, dy_strides: tuple[int, ...], strides: tuple[int, ...], dlogits_strides: tuple[int, ...], soft: bool
) -> Plan:
    return Plan(
        gumbel_softmax_bwd_kernel, work.grid, work.shape, dy_strides, strides, dlogits_strides, *work.numbers,
        SOFT=soft, SPLITS=next_power_of_2(work.splits), **work.options,
    )  # fmt: skip
