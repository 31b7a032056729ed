"""Arguments of pairs.c: mmd."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastkl.native._pack import Plan, keep, known, plans, prepare

KERNELS = {"imq": 0, "rbf": 1}


def _plan(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool) -> Plan | None:
    key = ("mmd", kernel, tuple(scales), unbiased, *known((x, y)))
    try:
        return plans[key]
    except KeyError:
        pass
    # The sizes in common are of the larger of the two; C gets the rows of each apart.
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
