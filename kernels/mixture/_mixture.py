"""Shared device code of the shared-mixture ops: the tile, and the loop over dimensions, four at a time.

A tile of rows x components is [own, TERMS, groups, LANES]. By rows, own * LANES are its rows and groups * TERMS its
components, over which sums are taken; by components, the other way round. Triton assigns the last dimensions to threads
and warps first. A thread has own * TERMS elements: it loads the data of one row or component once for many of the
other, TERMS neighbours by 16-byte loads, and computes most of a sum without communication.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkl.kernels._device import LN2, exp, not_infinite

# ---- Device functions ------------------------------------------------------------------------------------------------


@triton.jit
def fraction_and_exponent(x):
    """(f, e): x = f 2^e, 1 <= f < 2, for positive normal x; infinity gives 1 and a large e."""
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
def four(x, COUNT: tl.constexpr):
    """The four columns of [COUNT, 4]."""
    even, odd = tl.split(tl.reshape(x, [COUNT, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def quads(at, row, strides):
    """Pointers [rows, 4] to the first four columns."""
    return at + row.to(tl.int64)[:, None] * strides[0] + tl.arange(0, 4).to(tl.int64)[None, :] * strides[1]


@triton.jit
def load_rows(at, start, columns, TAIL: tl.constexpr, DTYPE: tl.constexpr):
    """Four columns, 0 beyond the last one; the padding of the parameters gives these no effect."""
    if TAIL:
        return tl.load(at, (start + tl.arange(0, 4) < columns)[None, :], other=0.0).to(DTYPE)
    return tl.load(at).to(DTYPE)


@triton.jit
def load_spread(at, start, columns, FORM: tl.constexpr, TAIL: tl.constexpr, DTYPE: tl.constexpr):
    """Four columns of q's variance (convolved: it is added to the components'), else of q's sigma."""
    value = load_rows(at, start, columns, TAIL, DTYPE)
    if FORM == "convolved":
        return not_infinite(exp(value))
    return exp(value, 0.5)


@triton.jit
def finite_spread(at, start, columns, FORM: tl.constexpr, TAIL: tl.constexpr, DTYPE: tl.constexpr):
    """load_spread, clamped to finite values: infinity times a weight of 0 would be NaN."""
    value = load_spread(at, start, columns, FORM, TAIL, DTYPE)
    return tl.minimum(value, 1e308 if value.dtype == tl.float64 else 3e38, tl.PropagateNan.ALL)


@triton.jit
def own_index(COUNT: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES) * (COUNT // LANES)
    return tl.arange(0, COUNT // LANES)[:, None, None, None] + lane[None, None, None, :]


@triton.jit
def term_index(COUNT: tl.constexpr, TERMS: tl.constexpr):
    return tl.arange(0, TERMS)[None, :, None, None] + (tl.arange(0, COUNT // TERMS) * TERMS)[None, None, :, None]


@triton.jit
def component_index(COMPONENTS: tl.constexpr, BY_ROWS: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr):
    """Indices of a tile's components, with dimensions of size 1 for its rows."""
    return term_index(COMPONENTS, TERMS) if BY_ROWS else own_index(COMPONENTS, LANES)


@triton.jit
def of_rows(x, BY_ROWS: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS] with dimensions of size 1 for a tile's components."""
    # Not one reshape: indexing with None also prevents the layout of x's load from becoming the tile's.
    if BY_ROWS:
        return tl.permute(tl.reshape(x, [LANES, x.shape[0] // LANES]), [1, 0])[:, None, None, :]
    else:
        return tl.permute(tl.reshape(x, [x.shape[0] // TERMS, TERMS]), [1, 0])[None, :, :, None]


@triton.jit
def squares(
    z_at, logvar_at, roots, means, columns, padded, steps,
    FORM: tl.constexpr, TAIL: tl.constexpr, BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr,
    TERMS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """-2 (ln N_k(z) - constant_k) for a tile.

    z_at and logvar_at are pointers [ROWS, 4] to the first four columns, and steps their distance to the next four.
    roots and means point to the first component, in rows of `padded` elements.
    """
    OWN: tl.constexpr = (ROWS if BY_ROWS else COMPONENTS) // LANES
    GROUPS: tl.constexpr = (COMPONENTS if BY_ROWS else ROWS) // TERMS
    total = tl.zeros([OWN, TERMS, GROUPS, LANES], dtype=DTYPE)
    lanes = component_index(COMPONENTS, BY_ROWS, TERMS, LANES)  # outside the loop: constant over its steps
    for start in range(0, columns, 4):
        zs = four(load_rows(z_at, start, columns, TAIL, DTYPE), ROWS)
        z_at += steps[0]
        if FORM != "point":
            vs = four(load_spread(logvar_at, start, columns, FORM, TAIL, DTYPE), ROWS)
            logvar_at += steps[1]
        if FORM == "convolved":
            product = tl.full(total.shape, 1.0, dtype=DTYPE)
            exponent = tl.zeros(total.shape, dtype=tl.int32)
        for i in tl.static_range(4):
            s = tl.load(roots + lanes)
            t = of_rows(zs[i], BY_ROWS, TERMS, LANES) - tl.load(means + lanes)
            roots += padded
            means += padded
            if FORM == "convolved":
                spread = s + of_rows(vs[i], BY_ROWS, TERMS, LANES)
                total += t * t / spread
                fraction, power = fraction_and_exponent(spread)
                product *= fraction
                exponent += power
            else:
                t *= s
                total += t * t
                if FORM == "expected":
                    u = of_rows(vs[i], BY_ROWS, TERMS, LANES) * s
                    total += u * u
        if FORM == "convolved":  # one logarithm for four variances
            total += tl.log(product) + exponent.to(DTYPE) * LN2
    return total


@triton.jit
def joint_tile(
    z_at, logvar_at, logits, normaliser, constants, roots, means, row, start, shape, steps,
    logits_strides, FORM: tl.constexpr, TAIL: tl.constexpr, BY_ROWS: tl.constexpr, ROWS: tl.constexpr,
    COMPONENTS: tl.constexpr, TERMS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """ln pi_k + ln N_k(z) for a tile; logits is None if all rows share them, as part of the constants.

    Forward and backward must use the same operations in the same order: backward subtracts the saved log-density.
    """
    columns, components, padded = shape
    total = squares(
        z_at, logvar_at, roots + start, means + start, columns, padded, steps,
        FORM, TAIL, BY_ROWS, ROWS, COMPONENTS, TERMS, LANES, DTYPE,
    )  # fmt: skip
    component = start + component_index(COMPONENTS, BY_ROWS, TERMS, LANES)
    constant = tl.load(constants + component)
    if logits is None:
        joint = (constant - tl.load(normaliser)) - 0.5 * total
    else:
        column = tl.minimum(component, components - 1).to(tl.int64)  # in range; the padding's constants are -inf
        at = of_rows(row.to(tl.int64) * logits_strides[0], BY_ROWS, TERMS, LANES) + column * logits_strides[1]
        weight = tl.load(logits + at).to(DTYPE)
        weight -= of_rows(tl.load(normaliser + row), BY_ROWS, TERMS, LANES)
        joint = weight + (constant - 0.5 * total)
    return joint
