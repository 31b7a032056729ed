"""Preparation of a mixture for the kernels of the shared-mixture ops, by one kernel before them.

The layout is [D, K] with contiguous components, padded so that the inner loops need no mask. It holds the means and
the roots of the precisions, or for the convolved form the variances. This costs one more read and write of the
parameters in each direction, and saves an exponential per row in the inner loops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE, exp, finite, not_infinite
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, next_power_of_2, registers

PAD = 128  # components are padded to tiles, of at most 128; dimensions to steps of the inner loop
STEP = 4
# The bounds use units of 2^40 sigma of a component, so that the square of 1 / sigma overflows later.
SHRUNK = tl.constexpr(2.0**-40)
PREPARE = {"COMPONENTS": 32, "COLUMNS": 32, "ROWS": 8, "LOGITS": 128}


class Prepared(NamedTuple):
    """A mixture as the prepare kernel writes it."""

    normaliser: torch.Tensor  # [I] ln sum exp logits
    constants: torch.Tensor  # [K padded] logits (if shared), determinant, 2 pi; -inf in the padding
    roots: torch.Tensor  # [D padded, K padded] exp(-logvars / 2), for "bounds" shrunk; convolved: exp(logvars)
    means: torch.Tensor  # [D padded, K padded]

    @property
    def padded(self) -> int:
        return self.roots.shape[1]


@triton.jit
def add_exponentials(top, total, value, AXIS: tl.constexpr):
    """(top, total) with total exp(top) = a sum of exponentials, after adding those of `value`; all may be -inf."""
    new = tl.maximum(top, tl.max(value, axis=AXIS))
    reference = finite(new)
    total = total * exp(top - reference) + tl.sum(exp(value - tl.expand_dims(reference, AXIS)), axis=AXIS)
    return new, total


@triton.jit
def spread(logvars, FORM: tl.constexpr):
    """A component's log-variances. For a q they are at least -120, in float64 -600, because q's own width dominates
    narrower components. In the convolved form no variance is subnormal."""
    wide = logvars.dtype == tl.float64
    if FORM == "convolved":
        return tl.maximum(logvars, -700.0 if wide else -87.0, tl.PropagateNan.ALL)
    if FORM != "point":
        return tl.maximum(logvars, -600.0 if wide else -120.0, tl.PropagateNan.ALL)
    return logvars


@triton.jit
def prepare_kernel(
    logits, means, logvars, normaliser, constants, roots, prepared_means, shape, logits_strides, means_strides,
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
        tl.store(prepared_means + at, m, inside)
        if FORM == "convolved":
            # Padded dimensions have a difference of 0 and a variance of 0; q's variance is 1 there, and ln 1 = 0.
            tl.store(roots + at, tl.where((column < columns)[None, :], not_infinite(exp(v)), 0.0), inside)
        else:
            # A component this narrow has density only at its mean. Bounded, because 0 * inf would be NaN.
            most = 1e150 if v.dtype == tl.float64 else 1e30
            s = tl.minimum(exp(-0.5 * v), most / tl.maximum(tl.abs(m), 1.0), tl.PropagateNan.ALL)
            if FORM == "bounds":
                s *= SHRUNK
            # Padding components get root 1; with 0, an infinite z would give inf * 0 = NaN.
            tl.store(roots + at, tl.where((column < columns)[None, :], s, 0.0), inside)
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


def prepare(logits: Tensor, means: Tensor, logvars: Tensor | None, form: str, dtype: torch.dtype) -> Prepared:
    """means is [1, K, D], logvars broadcasts with it."""
    _, components, columns = means.shape
    rows, device = logits.shape[0], means.device
    pad = min(PAD, max(32, next_power_of_2(components)))
    padded_components, padded_columns = cdiv(components, pad) * pad, cdiv(columns, STEP) * STEP
    empty: dict[str, Any] = {"dtype": dtype, "device": device}
    mixture = Prepared(
        torch.empty(rows, **empty), torch.empty(padded_components, **empty),
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
