"""A mixture as the kernels of the shared-mixture ops want it, written once before them.

[D, K], components side by side, padded so that the inner loops need no mask: a root of the precision s and (m - c) s,
or for the convolved form the variance and the mean. It reads and writes the parameters' size once more in each
direction, which saves an exponential, or two subtractions, for each row in the inner loops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import TRITON_DTYPE, exp, finite, not_infinite
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, next_power_of_2, registers

PAD = 128  # components are padded to whole tiles, of 128 at most, dimensions to whole steps of the inner loop
STEP = 4
# The bounds take components in units of 2^40 of their sigma: the square of 1 / sigma in these has that much more room.
SHRUNK = tl.constexpr(2.0**-40)
PREPARE = {"COMPONENTS": 32, "COLUMNS": 32, "ROWS": 8, "LOGITS": 128}


class Mixture(NamedTuple):
    """What the prepare kernel wrote; `pointers` and `shape` go to the kernels."""

    normaliser: torch.Tensor  # [I] ln sum exp logits
    centre: torch.Tensor  # [D padded], taken off z before anything else
    constants: torch.Tensor  # [K padded] logits (where shared), determinant, 2 pi; -inf in the padding
    roots: torch.Tensor  # [D padded, K padded] exp(-logvars / 2), for "bounds" shrunk; convolved: exp(logvars)
    means: torch.Tensor  # [D padded, K padded] (means - centre) roots; convolved: means

    @property
    def padded(self) -> int:
        return self.roots.shape[1]


@triton.jit
def add_exponentials(top, total, value, AXIS: tl.constexpr):
    """(top, total) with total exp(top) = a sum of exponentials, after `value`'s are added; -inf everywhere is legal."""
    new = tl.maximum(top, tl.max(value, axis=AXIS))
    reference = finite(new)
    total = total * exp(top - reference) + tl.sum(exp(value - tl.expand_dims(reference, AXIS)), axis=AXIS)
    return new, total


@triton.jit
def spread(logvars, FORM: tl.constexpr):
    """A component's log-variances. To a q none is below -120, in float64 -600: it blurs what is narrower. Where the
    variances are added, none is a subnormal number."""
    wide = logvars.dtype == tl.float64
    if FORM == "convolved":
        return tl.maximum(logvars, -700.0 if wide else -87.0, tl.PropagateNan.ALL)
    if FORM != "point":
        return tl.maximum(logvars, -600.0 if wide else -120.0, tl.PropagateNan.ALL)
    return logvars


@triton.jit
def prepare_kernel(
    logits, means, logvars, normaliser, centre, constants, roots, scaled_means, shape, logits_strides, means_strides,
    logvars_strides,
    FORM: tl.constexpr, SHARED: tl.constexpr, DTYPE: tl.constexpr,
    COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """One program per tile of parameters, then one per block of rows of logits."""
    rows, components, columns, padded_components, padded_columns, column_blocks, tiles = shape
    program = tl.program_id(0)
    if program >= tiles:
        row = (program - tiles) * ROWS + tl.arange(0, ROWS)
        top = tl.full([ROWS], float("-inf"), dtype=DTYPE)
        total = tl.zeros([ROWS], dtype=DTYPE)
        for start in range(0, components, LOGITS):
            component = start + tl.arange(0, LOGITS)
            mask = (row < rows)[:, None] & (component < components)[None, :]
            at = row.to(tl.int64)[:, None] * logits_strides[0] + component.to(tl.int64)[None, :] * logits_strides[1]
            value = tl.load(logits + at, mask, other=float("-inf")).to(DTYPE)  # a weight of zero
            top, total = add_exponentials(top, total, value, 1)
        tl.store(normaliser + row, top + tl.log(total), mask=row < rows)
    else:
        component = program // column_blocks * COMPONENTS + tl.arange(0, COMPONENTS)
        column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        real = component < components
        mask = real[:, None] & (column < columns)[None, :]
        wide, narrow = component.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
        at = wide * means_strides[0] + narrow * means_strides[1]
        m = tl.load(means + at, mask, other=0.0).to(DTYPE)
        v = tl.zeros([COMPONENTS, COLUMNS], dtype=DTYPE)
        if logvars is not None:
            at = wide * logvars_strides[0] + narrow * logvars_strides[1]
            v += spread(tl.load(logvars + at, mask, other=0.0).to(DTYPE), FORM)  # a variance of 1
        at = column.to(tl.int64)[None, :] * padded_components + component[:, None]
        inside = (component < padded_components)[:, None] & (column < padded_columns)[None, :]
        if FORM == "convolved":
            # Padding: a dimension has a difference of 0, and a variance of 0 beside which q's is 1; ln 1 = 0.
            tl.store(roots + at, tl.where((column < columns)[None, :], not_infinite(exp(v)), 0.0), inside)
            tl.store(scaled_means + at, m, inside)
        else:
            # The average of the first components where it dwarfs their distances, so that shifting z and means together
            # changes next to nothing; z - c is then exact. Elsewhere 0: z - c would only be rounded.
            some = tl.arange(0, COMPONENTS)
            at_some = some.to(tl.int64)[:, None] * means_strides[0] + narrow * means_strides[1]
            inside_some = (some < components)[:, None] & (column < columns)[None, :]
            first = tl.load(means + at_some, inside_some, other=0.0).to(DTYPE)
            average = tl.sum(first, axis=0) / tl.minimum(components, COMPONENTS)
            distance = tl.max(tl.where(inside_some, tl.abs(first - average[None, :]), 0.0), axis=0)
            c = tl.where(tl.abs(average) > 2.0 * distance, average, 0.0)
            # What is so narrow has a density at its mean alone: bounded, or 0 times infinity would be NaN.
            most = 1e150 if v.dtype == tl.float64 else 1e30
            s = tl.minimum(exp(-0.5 * v), most / tl.maximum(tl.abs(m - c[None, :]), 1.0), tl.PropagateNan.ALL)
            if FORM == "bounds":
                s *= SHRUNK
            # Components of the padding have a root of 1: far from an infinite z, as from any, where 0 would make NaN.
            tl.store(roots + at, tl.where((column < columns)[None, :], s, 0.0), inside)
            tl.store(scaled_means + at, tl.where(mask, (m - c[None, :]) * s, 0.0), inside)
            if program < column_blocks:
                tl.store(centre + column, c, mask=column < padded_columns)
        if program % column_blocks == 0:
            log_scale = tl.zeros([COMPONENTS, COLUMNS], dtype=DTYPE)
            if logvars is not None and FORM != "convolved":
                for start in range(0, columns, COLUMNS):
                    each = start + tl.arange(0, COLUMNS)
                    at = wide * logvars_strides[0] + each.to(tl.int64)[None, :] * logvars_strides[1]
                    value = tl.load(logvars + at, real[:, None] & (each < columns)[None, :], other=0.0).to(DTYPE)
                    log_scale += spread(value, FORM)
            half_log = tl.full([COMPONENTS], 0.9189385332046727, dtype=DTYPE)  # 1/2 ln 2 pi
            constant = -0.5 * tl.sum(log_scale, axis=1) - half_log * columns
            if SHARED:
                constant += tl.load(logits + component * logits_strides[1], real, other=0.0).to(DTYPE)
            tl.store(constants + component, tl.where(real, constant, float("-inf")), component < padded_components)


def prepare(logits, means, logvars, form: str, dtype: torch.dtype) -> Mixture:
    """means is [1, K, D], logvars broadcasts with it."""
    _, components, columns = means.shape
    rows, device = logits.shape[0], means.device
    pad = min(PAD, max(32, next_power_of_2(components)))
    padded_components, padded_columns = cdiv(components, pad) * pad, cdiv(columns, STEP) * STEP
    empty = {"dtype": dtype, "device": device}
    mixture = Mixture(
        torch.empty(rows, **empty), torch.empty(padded_columns, **empty), torch.empty(padded_components, **empty),
        torch.empty((padded_columns, padded_components), **empty),
        torch.empty((padded_columns, padded_components), **empty),
    )  # fmt: skip
    column_blocks = max(1, cdiv(padded_columns, PREPARE["COLUMNS"]))
    tiles = column_blocks * cdiv(padded_components, PREPARE["COMPONENTS"])
    full = None if logvars is None else logvars.expand(means.shape)
    launch(
        prepare_kernel, (tiles + cdiv(rows, PREPARE["ROWS"]),), logits, means, full, *mixture,
        (rows, components, columns, padded_components, padded_columns, column_blocks, tiles),
        logits.stride(), means.stride()[1:], (0, 0) if full is None else full.stride()[1:],
        FORM=form, SHARED=rows == 1, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **PREPARE,
        **registers(168),
    )  # fmt: skip
    return mixture
