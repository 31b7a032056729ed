"""What the kernels of the shared-mixture ops have in common: prepared parameters, the inner loop, the finishing sums.

A prepare kernel writes the mixture once as [D, K] (components side by side, padded so that the inner loops need no
mask): a root of the precision s and (m - c) s, or for the convolved form the variance and the mean. The inner loops run
over d, four at a time, and a thread owns whole rows (by_rows: tiles are [components, rows], so that a sum over
components stays in the thread) or whole components ([rows, components], for sums over rows).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import LN2, exp
from fastkl.kernels._layout import PROGRAMS, cdiv, next_power_of_2, share

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
PAD = 128  # components are padded to whole tiles, of 128 at most, dimensions to whole steps of the inner loop
STEP = 4
# Bytes that partial sums may take, all splits together, unless a single one takes more.
PARTIAL_BYTES = 32 << 20
PREPARE = {"COMPONENTS": 32, "COLUMNS": 32, "ROWS": 8, "LOGITS": 128}


# ---- Prepared parameters ---------------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """What the prepare kernel wrote; `pointers` and `shape` go to the kernels."""

    normaliser: torch.Tensor  # [I] ln sum exp logits
    centre: torch.Tensor  # [D padded], taken off z before anything else
    constants: torch.Tensor  # [K padded] logits (where shared), determinant, 2 pi; -inf in the padding
    roots: torch.Tensor  # [D padded, K padded] exp(-logvars / 2); convolved: exp(logvars)
    means: torch.Tensor  # [D padded, K padded] (means - centre) roots; convolved: means

    @property
    def padded(self) -> int:
        return self.roots.shape[1]


@triton.jit
def prepare_kernel(
    logits, means, logvars, normaliser, centre, constants, roots, scaled_means, shape, strides,
    CONVOLVED: tl.constexpr, SHARED: tl.constexpr, DTYPE: tl.constexpr,
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
            at = row.to(tl.int64)[:, None] * strides[0][0] + component.to(tl.int64)[None, :] * strides[0][1]
            value = tl.load(logits + at, mask, other=float("-inf")).to(DTYPE)  # a weight of zero
            top, total = add_exponentials(top, total, value, 1)
        tl.store(normaliser + row, top + tl.log(total), mask=row < rows)
    else:
        component = program // column_blocks * COMPONENTS + tl.arange(0, COMPONENTS)
        column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        real = component < components
        mask = real[:, None] & (column < columns)[None, :]
        at = component.to(tl.int64)[:, None] * strides[1][0] + column.to(tl.int64)[None, :] * strides[1][1]
        m = tl.load(means + at, mask, other=0.0).to(DTYPE)
        v = tl.zeros([COMPONENTS, COLUMNS], dtype=DTYPE)
        if logvars is not None:
            at = component.to(tl.int64)[:, None] * strides[2][0] + column.to(tl.int64)[None, :] * strides[2][1]
            v += tl.load(logvars + at, mask, other=0.0).to(DTYPE)  # a variance of 1
        at = column.to(tl.int64)[None, :] * padded_components + component[:, None]
        inside = (component < padded_components)[:, None] & (column < padded_columns)[None, :]
        if CONVOLVED:
            # Padding: a dimension has a difference of 0, and a variance of 0 beside which q's is 1; ln 1 = 0.
            tl.store(roots + at, tl.where((column < columns)[None, :], exp(v), 0.0), inside)
            tl.store(scaled_means + at, m, inside)
        else:
            # The average of the first components where it dwarfs their distances, so that shifting z and means together
            # changes next to nothing; z - c is then exact. Elsewhere 0: z - c would only be rounded.
            some = tl.arange(0, COMPONENTS)
            at_some = some.to(tl.int64)[:, None] * strides[1][0] + column.to(tl.int64)[None, :] * strides[1][1]
            inside_some = (some < components)[:, None] & (column < columns)[None, :]
            first = tl.load(means + at_some, inside_some, other=0.0).to(DTYPE)
            average = tl.sum(first, axis=0) / tl.minimum(components, COMPONENTS)
            distance = tl.max(tl.where(inside_some, tl.abs(first - average[None, :]), 0.0), axis=0)
            c = tl.where(tl.abs(average) > 2.0 * distance, average, 0.0)
            s = exp(-0.5 * v)
            tl.store(roots + at, tl.where(mask, s, 0.0), inside)
            tl.store(scaled_means + at, tl.where(mask, (m - c[None, :]) * s, 0.0), inside)
            if program < column_blocks:
                tl.store(centre + column, c, mask=column < padded_columns)
        if program % column_blocks == 0:
            log_scale = tl.zeros([COMPONENTS, COLUMNS], dtype=DTYPE)
            if logvars is not None and not CONVOLVED:
                for start in range(0, columns, COLUMNS):
                    each = start + tl.arange(0, COLUMNS)
                    at = component.to(tl.int64)[:, None] * strides[2][0] + each.to(tl.int64)[None, :] * strides[2][1]
                    log_scale += tl.load(logvars + at, real[:, None] & (each < columns)[None, :], other=0.0).to(DTYPE)
            half_log = tl.full([COMPONENTS], 0.9189385332046727, dtype=DTYPE)  # 1/2 ln 2 pi
            constant = -0.5 * tl.sum(log_scale, axis=1) - half_log * columns
            if SHARED:
                constant += tl.load(logits + component * strides[0][1], real, other=0.0).to(DTYPE)
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
    prepare_kernel[(tiles + cdiv(rows, PREPARE["ROWS"]),)](
        logits, means, full, *mixture,
        (rows, components, columns, padded_components, padded_columns, column_blocks, tiles),
        (logits.stride(), means.stride()[1:], means.stride()[1:] if full is None else full.stride()[1:]),
        CONVOLVED=form == "convolved", SHARED=rows == 1, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **PREPARE,
    )  # fmt: skip
    return mixture


def blocks(
    dtype: torch.dtype, form: str, kind: str, rows: int, components: int, *, own: bool, tail: bool
) -> dict[str, int]:  # fmt: skip
    """A tile of rows x components for the forward kernel, that by "rows" or that by "components".

    A thread owns two rows and 16 components, or one component and 32 rows; fewer where an element takes more registers.
    Sums that few rows or components would leave to few programs are shared by the warps of one, which saves partial
    sums in memory. `own`: each row has logits of its own; `tail`: its last step of the inner loop is masked.
    """
    few = kind == "rows" and cdiv(rows, 64) < PROGRAMS // 2
    half = dtype == torch.float64
    halvings = half + (form == "convolved") * (1 + half) + own * (2 if kind == "rows" else 1)
    halvings += (form == "expected") * (tail + (kind != "forward" or own or half) + (own and kind == "forward"))
    if kind == "components":
        halvings = max(halvings, 2 * (form == "expected"))
        warps = min(8, next_power_of_2(cdiv(rows, 32)))
        return {"ROWS": max(4, 32 >> halvings) * warps, "COMPONENTS": 32, "num_warps": warps}
    if kind == "rows" and half:
        halvings = max(2, halvings + (form == "convolved"))
    least = 2 if kind == "rows" else 4
    if few:
        warps = min(4, next_power_of_2(cdiv(components, 32)))
        return {"ROWS": 32, "COMPONENTS": max(least, 32 >> halvings) * warps, "num_warps": warps}
    return {"ROWS": 32 if halvings else 64, "COMPONENTS": max(least, 16 >> max(0, halvings - 1)), "num_warps": 1}


def split(total: int, block: int, others: int, partial_bytes: int, read_bytes: float = math.inf) -> tuple[int, int]:
    """(length, count): `total` cut so that, with `others` programs each, a GPU is full and the partial sums bounded;
    also by what is read in any case, where half of the programs are enough."""
    partial_bytes = max(1, partial_bytes)
    enough = max(cdiv(PROGRAMS // 2, others), read_bytes / partial_bytes)
    return share(total, block, int(min(cdiv(PROGRAMS, others), enough, max(1, PARTIAL_BYTES // partial_bytes))))


# ---- Device functions ------------------------------------------------------------------------------------------------


@triton.jit
def add_exponentials(top, total, value, AXIS: tl.constexpr):
    """(top, total) with total exp(top) = a sum of exponentials, after `value`'s are added; -inf everywhere is legal."""
    new = tl.maximum(top, tl.max(value, axis=AXIS))
    reference = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
    total = total * exp(top - reference) + tl.sum(exp(value - tl.expand_dims(reference, AXIS)), axis=AXIS)
    return new, total


@triton.jit
def fraction_and_exponent(x):
    """(f, e): x = f 2^e, 1 <= f < 2, for positive finite x that are no subnormals; of infinity 1 and a large e."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits >> 52).to(tl.int32) - 1023
        fraction = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127
        fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return fraction, exponent


@triton.jit
def by_row(x, BY_ROWS: tl.constexpr):
    return x[None, :] if BY_ROWS else x[:, None]


@triton.jit
def by_component(x, BY_ROWS: tl.constexpr):
    return x[:, None] if BY_ROWS else x[None, :]


@triton.jit
def four(x, COUNT: tl.constexpr):
    """[COUNT, 4] as its four columns."""
    even, odd = tl.split(tl.reshape(x, [COUNT, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def together(x0, x1, x2, x3, COUNT: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [COUNT, 4])


@triton.jit
def load_rows(at, start, columns, TAIL: tl.constexpr, DTYPE: tl.constexpr):
    """Four columns; beyond the last one 0, which the padding of the parameters makes irrelevant."""
    if TAIL:
        return tl.load(at, (start + tl.arange(0, 4) < columns)[None, :], other=0.0).to(DTYPE)
    return tl.load(at).to(DTYPE)


@triton.jit
def load_centred(at, centre, start, columns, FORM: tl.constexpr, TAIL: tl.constexpr, DTYPE: tl.constexpr):
    value = load_rows(at, start, columns, TAIL, DTYPE)
    if FORM != "convolved":  # whose differences are taken first
        value -= tl.load(centre + start + tl.arange(0, 4))[None, :]
    return value


@triton.jit
def squares(
    z_at, logvar_at, centre, roots, scaled_means, columns, padded, steps,
    FORM: tl.constexpr, TAIL: tl.constexpr, BY_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """-2 (ln N_k(z) - constant_k) for a tile: [COMPONENTS, ROWS] by rows, else [ROWS, COMPONENTS].

    z_at and logvar_at are [ROWS, 4] pointers to the first columns, steps their distance to the next four; roots and
    scaled_means point at the first component, in rows of `padded` elements.
    """
    total = tl.zeros([COMPONENTS, ROWS] if BY_ROWS else [ROWS, COMPONENTS], dtype=DTYPE)
    lanes = tl.arange(0, COMPONENTS)  # constants, so that they become part of the load instructions
    for start in range(0, columns, 4):
        zs = four(load_centred(z_at, centre, start, columns, FORM, TAIL, DTYPE), ROWS)
        z_at += steps[0]
        if FORM != "point":
            vs = four(exp(load_rows(logvar_at, start, columns, TAIL, DTYPE)), ROWS)
            logvar_at += steps[1]
        if FORM == "convolved":
            product = tl.full(total.shape, 1.0, dtype=DTYPE)
            exponent = tl.zeros(total.shape, dtype=tl.int32)
        for i in tl.static_range(4):
            s = by_component(tl.load(roots + lanes), BY_ROWS)
            ms = by_component(tl.load(scaled_means + lanes), BY_ROWS)
            roots += padded
            scaled_means += padded
            if FORM == "convolved":
                t = by_row(zs[i], BY_ROWS) - ms
                spread = s + by_row(vs[i], BY_ROWS)
                total += t * t / spread
                fraction, power = fraction_and_exponent(spread)
                product *= fraction
                exponent += power
            else:
                t = by_row(zs[i], BY_ROWS) * s - ms
                total += t * t
                if FORM == "expected":
                    total += by_row(vs[i], BY_ROWS) * (s * s)
        if FORM == "convolved":  # one logarithm for four variances
            total += tl.log(product) + exponent.to(DTYPE) * LN2
    return total


@triton.jit
def joint_tile(
    z_at, logvar_at, logits, normaliser, centre, constants, roots, scaled_means, row, start, shape, steps, strides,
    FORM: tl.constexpr, TAIL: tl.constexpr, BY_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """ln pi_k + ln N_k(z) for a tile; logits is None where they are shared, and part of the constants.

    Always by the same operations in the same order: backward subtracts the saved log-density from these very values.
    """
    columns, components, padded = shape
    component = start + tl.arange(0, COMPONENTS)
    total = squares(
        z_at, logvar_at, centre, roots + start, scaled_means + start, columns, padded, steps,
        FORM, TAIL, BY_ROWS, ROWS, COMPONENTS, DTYPE,
    )  # fmt: skip
    constant = tl.load(constants + component)
    if logits is None:
        joint = by_component(constant - tl.load(normaliser), BY_ROWS) - 0.5 * total
    else:
        column = tl.minimum(component, components - 1).to(tl.int64)  # the padding's constants are -inf already
        at = by_row(row.to(tl.int64) * strides[0], BY_ROWS) + by_component(column * strides[1], BY_ROWS)
        weight = tl.load(logits + at).to(DTYPE)
        weight -= by_row(tl.load(normaliser + row), BY_ROWS)
        joint = weight + (by_component(constant, BY_ROWS) - 0.5 * total)
    return joint
