"""Shared device code of both bounds on KL(q || mixture), for diagonal components and a mixture that all rows share.

In units of a component's sigma, t = (mu - m) / sigma_k and w = exp(logvar) / sigma_k^2, its terms in the bounds are

    upper  -1/2 [t^2 + w + ...]                        E_q[ln N_k]
    lower  -1/2 [t^2 / (1 + w) + ln(1 + w) + ...]      ln E_q[N_k]

The rest depends only on the component and is the same, so one prepared mixture, one t and one w serve both. 1 + w is at
least 1, so its inverse can be the square of a reciprocal root.

t and the root of w are scaled by 2^-40. In float32, w may then be e^144 before 1 + w overflows, and the digits of w
lost below 2^-46 do not matter beside the 1. If 1 + w overflows, the lower bound is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import LN2, exp, two_parts, weighted
from fastkl.kernels._layout import OLD_COMPILER, PROGRAMS, SPILLS_A_FEW, cdiv, next_power_of_2, registers
from fastkl.kernels.mixture._mixture import four, fraction_and_exponent, load_rows
from fastkl.kernels.mixture._mixture_prepare import SHRUNK


def blocks(dtype: torch.dtype, kind: str, rows: int, components: int, *, scattered: str) -> dict[str, int]:
    """A tile of rows x components for the kernel "forward", by "rows" or by "components".

    As kernels._mixture's, with fewer elements a thread, each of which takes two sums or weights.
    """
    half = dtype == torch.float64
    if kind == "components":
        warps = 8 if half else min(8, next_power_of_2(cdiv(rows, 32)))
        return {"ROWS": (1 if half else 8) * warps, "COMPONENTS": 32, "num_warps": warps, **registers(255)}
    few = kind == "rows" and cdiv(rows, 64) < PROGRAMS // 2  # programs: the warps of one share a sum over components
    warps = min(4, next_power_of_2(cdiv(components, 32))) if few else 1
    halvings = max(bool(scattered), 2 * half)
    if kind == "rows":
        halvings = max(1 + bool(scattered) * (1 + OLD_COMPILER), (3 + OLD_COMPILER) * half)
    held = registers(255) if SPILLS_A_FEW or (OLD_COMPILER and half) or (few and (scattered or half)) else {}
    return {"ROWS": 32, "COMPONENTS": (16 >> halvings) * warps, "num_warps": warps, **held}


@triton.jit
def by_row(x, BY_ROWS: tl.constexpr):
    return x[None, :] if BY_ROWS else x[:, None]


@triton.jit
def by_component(x, BY_ROWS: tl.constexpr):
    return x[:, None] if BY_ROWS else x[None, :]


@triton.jit
def load_four(mu_at, logvar_at, start, columns, TAIL: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Four columns of mu and of sigma."""
    zs = four(load_rows(mu_at, start, columns, TAIL, DTYPE), ROWS)
    return zs, four(exp(load_rows(logvar_at, start, columns, TAIL, DTYPE), 0.5), ROWS)


@triton.jit
def element(z, sigma, s, mean):
    """(t, sqrt w, 1 + w) of one dimension, scaled by 2^-40 like s."""
    t = (z - mean) * s
    u = sigma * s
    return t, u, u * u + SHRUNK * SHRUNK


@triton.jit
def joint_tiles(
    mu_at, logvar_at, normaliser, constants, roots, means, start, shape, steps,
    TAIL: tl.constexpr, BY_ROWS: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """ln pi_k + the terms of component k in the lower and the upper bound: [COMPONENTS, ROWS] by rows, else transposed.

    Forward and backward must use the same operations in the same order: backward subtracts the saved log-densities.
    """
    lower = tl.zeros([COMPONENTS, ROWS] if BY_ROWS else [ROWS, COMPONENTS], dtype=DTYPE)
    upper = tl.zeros(lower.shape, dtype=DTYPE)
    # The product of all 1 + w as product 2^exponent, 1 <= product < 2, which needs only one logarithm.
    product = tl.full(lower.shape, 1.0, dtype=DTYPE)
    exponent = tl.zeros(lower.shape, dtype=tl.int32) + tl.cdiv(shape[0], 4) * 320  # each 1 + w lacks a factor of 2^80
    lanes = tl.arange(0, COMPONENTS)  # constants, which become immediate offsets of the loads
    roots += start
    means += start
    for d in range(0, shape[0], 4):
        zs, vs = load_four(mu_at, logvar_at, d, shape[0], TAIL, ROWS, DTYPE)
        mu_at += steps[0]
        logvar_at += steps[1]
        for i in tl.static_range(4):
            s = by_component(tl.load(roots + lanes), BY_ROWS)
            mean = by_component(tl.load(means + lanes), BY_ROWS)
            roots += shape[2]
            means += shape[2]
            t, u, one_plus_w = element(by_row(zs[i], BY_ROWS), by_row(vs[i], BY_ROWS), s, mean)
            upper += t * t
            upper += u * u
            product, power = fraction_and_exponent(product * one_plus_w)
            exponent += power
            t *= tl.rsqrt(one_plus_w)
            lower += t * t
    # An infinite upper bound with a small distance in the lower one means that w, not t, has overflowed.
    lower = tl.where((upper == float("inf")) & (lower < 1e15), float("nan"), lower)
    lower += tl.log(product) + exponent.to(DTYPE) * LN2
    constant = by_component(tl.load(constants + start + lanes) - tl.load(normaliser), BY_ROWS)
    return constant - 0.5 * lower, constant - 0.5 / (SHRUNK * SHRUNK) * upper


@triton.jit
def weights(joint, lp, gradient, row, BY_ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Gradients in the joint log-densities, with a minus sign, because the bounds fall as log-densities rise."""
    value, rest = two_parts(tl.load(lp + row), DTYPE)
    return weighted(-by_row(gradient, BY_ROWS), exp(joint - by_row(value, BY_ROWS) - by_row(rest, BY_ROWS)))


@triton.jit
def together(x0, x1, x2, x3, COUNT: tl.constexpr):
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [COUNT, 4])
