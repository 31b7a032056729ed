"""The first pass over classes that do not fit one tile: statistics of every split of the classes, and their sum."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import finite
from fastkl.kernels._launch import Plan, planned
from fastkl.kernels._layout import compute_dtype
from fastkl.kernels.categorical._gumbel_softmax import (
    NOT_A_CLASS,
    first_maximum,
    offsets,
    perturbed,
    temperature,
    tile,
)


@triton.jit
def combine(found, found_third, distribution, count, scale, splits, AXIS: tl.constexpr, SPLITS: tl.constexpr,
            INTEGER: tl.constexpr):  # fmt: skip
    """(maximum, sum, class of the maximum or weighted gradient), merged over the splits."""
    split = tl.arange(0, SPLITS)[:, None]
    mask = (split < splits) & (distribution < count)[None, :]
    at = split.to(tl.int64) * count + distribution[None, :]
    tops = tl.load(found + at, mask, other=float("-inf"))  # the maximum of an empty split
    top = finite(tl.max(tops, axis=0))
    weight = tl.exp2((tops - top[None, :]) * scale)
    total = tl.sum(weight * tl.load(found + at + splits * count, mask, other=0.0), axis=0)
    if INTEGER:
        third = tl.load(found_third + at, mask, other=NOT_A_CLASS)
        third = tl.min(tl.where(tops == top[None, :], third, NOT_A_CLASS), axis=0)
    else:
        third = tl.sum(weight * tl.load(found_third + at, mask, other=0.0), axis=0)
    return tl.expand_dims(top, AXIS), tl.expand_dims(total, AXIS), tl.expand_dims(third, AXIS)


@triton.jit
def statistics_kernel(
    logits, dy, tau, seed, stream, found, found_third, shape, strides, dy_strides, column_blocks, classes_per_program,
    splits, count, SOFT: tl.constexpr, TENSOR: tl.constexpr, AXIS: tl.constexpr, ODD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of each split of the classes, and the first class with the maximum or, given dy,
    the sum weighted by dy. With SOFT, `logits` holds the weights."""
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    scale = temperature(tau, TENSOR, DTYPE)[0]
    key = tl.load(seed)
    begin = split * classes_per_program
    top = tl.full([ROWS, 1] if AXIS == 1 else [1, COLUMNS], 0.0 if SOFT else float("-inf"), DTYPE)
    best = tl.full([ROWS, 1] if AXIS == 1 else [1, COLUMNS], NOT_A_CLASS, tl.int32)
    total = tl.zeros([ROWS, COLUMNS], DTYPE)
    dot = tl.zeros([ROWS, COLUMNS], DTYPE)
    last = tl.minimum(begin + classes_per_program, shape[1] + 3 if AXIS == 1 and ODD else shape[1])
    for start in range(begin, last, COLUMNS if AXIS == 1 else ROWS):
        line, first, column, index, _own, mask = tile(block, start, shape, column_blocks, AXIS, ODD, ROWS, COLUMNS)
        at = offsets(block, line, column, index, strides, column_blocks, AXIS)
        if SOFT:
            weight = tl.load(logits + at, mask, other=0.0).to(DTYPE)  # a weight of 0
        else:
            values = perturbed(
                logits + at, mask, key, stream, line, first, column, shape, AXIS, ODD, ROWS, COLUMNS, DTYPE
            )
            highest = tl.max(values, axis=AXIS, keep_dims=True)
            if dy is None:
                best = tl.where(highest > top, first_maximum(values, index, highest, AXIS), best)
            new = tl.maximum(top, highest)
            weight = tl.exp2((values - finite(new)) * scale)
            shrink = tl.exp2((top - finite(new)) * scale)
            total *= shrink
            dot *= shrink
            top = new
        total += weight
        if dy is not None:
            at = offsets(block, line, column, index, dy_strides, column_blocks, AXIS)
            dot += weight * tl.load(dy + at, mask, other=0.0).to(DTYPE)  # masked entries have weight 0
    distribution = tile(block, begin, shape, column_blocks, AXIS, ODD, ROWS, COLUMNS)[4]
    at = tl.expand_dims(split.to(tl.int64) * count + distribution, AXIS)
    # Columns past the end of an inner block would belong to the next outer index.
    inside = distribution < count if AXIS == 1 else tl.arange(0, COLUMNS) + block % column_blocks * COLUMNS < shape[2]
    inside = tl.expand_dims(inside, AXIS)
    tl.store(found + at, top, inside)
    tl.store(found + at + splits * count, tl.sum(total, axis=AXIS, keep_dims=True), inside)
    third = best if dy is None else tl.sum(dot, axis=AXIS, keep_dims=True)
    tl.store(found_third + at, third, inside)


@planned
def plan_statistics(work: Any, strides: tuple[int, ...], dy_strides: tuple[int, ...], soft: bool) -> Plan:
    return Plan(statistics_kernel, work.grid, work.shape, strides, dy_strides, *work.numbers, SOFT=soft, **work.options)


def statistics(
    work: Any, x: Tensor, dy: Tensor | None, tau: Tensor | float, seed: Tensor, stream: int, soft: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(maxima and sums, third) of each split, or None where one tile holds all classes."""
    if work.whole:
        return None, None
    dtype = compute_dtype([x])
    found = torch.empty((2, work.splits, work.count), dtype=dtype, device=x.device)
    third = torch.empty(found.shape[1:], dtype=torch.int32 if dy is None else dtype, device=x.device)
    plan = plan_statistics(work, x.stride(), x.stride() if dy is None else dy.stride(), soft)
    plan.launch(x, dy, tau, seed, stream, found, third)
    return found, third
