"""Arguments of pairs.c: MMD of points."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastkl.native._pack import Plan, keep, known, plans, prepare

KERNELS = {"imq": 0, "rbf": 1}
BETWEEN = 2  # instead of whether the estimate is unbiased: only the pairs of a point of x with one of y


def _plan(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: int) -> Plan | None:
    """The plan of the squared MMD, or with `unbiased` BETWEEN of the pairs of x and y alone."""
    key = ("mmd", kernel, tuple(scales), unbiased, *known((x, y)))
    try:
        return plans[key]
    except KeyError:
        pass
    # The plan has the sizes of the larger batch. C gets the number of rows of each batch separately.
    shape = (max(len(x), len(y)), x.shape[1])
    count = len(scales)
    bits = struct.unpack(f"{count}q", struct.pack(f"{count}d", *scales))
    settings = (KERNELS[kernel], unbiased, len(x), len(y), count, *bits)
    return keep(key, prepare("pairs", "mmd", settings, shape, 1, (x, y), (x.stride(), y.stride()), others=3))


def mmd(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, dx: bool, dy: bool):
    plan = _plan(x, y, kernel, scales, unbiased)
    if plan is None:
        return NotImplemented
    value = x.new_empty((), dtype=torch.float64)
    gradients = [z.new_empty(z.shape, dtype=plan.dtype) if want else None for z, want in ((x, dx), (y, dy))]
    plan.run(x, y, *gradients, value)
    return [value, *(gradient for gradient in gradients if gradient is not None)]


def mmd_between(x: Tensor, y: Tensor, kernel: str, scales: list[float], dx: bool):
    plan = _plan(x, y, kernel, scales, BETWEEN)
    if plan is None:
        return NotImplemented
    value = x.new_empty((), dtype=torch.float64)
    gradient = x.new_empty(x.shape, dtype=plan.dtype) if dx else None
    plan.run(x, y, gradient, None, value)
    # It computes -2 times the mean.
    return [each.mul_(-0.5 * len(x) * len(y)) for each in (value, gradient) if each is not None]
