"""Arguments of sinkhorn.c: the potentials of two small sets of points."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from fastkl.native._pack import NO_MEMORY, function

LEAST = 1e-100  # temperature; below, costs divided by it may overflow
MOST_PAIRS = 1 << 18  # whose costs, twice in float64, are at most 4 MiB


def potentials(x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor, schedule: list[float], pulls: bool):
    """(f [N], g [M], pulls of x [N, D], pulls of y) in float64, the last two None without `pulls`; or NotImplemented.

    x and y are the points [N, D] and [M, D], of one dtype with their weights; if they are one tensor, so are the
    results.
    """
    if (
        len(x) * len(y) > MOST_PAIRS
        or schedule[-1] < LEAST
        or (found := function("sinkhorn", "potentials", x.dtype)) is None
    ):
        return NotImplemented
    same = x is y
    x, y = x.contiguous(), y.contiguous()
    temperatures = torch.tensor(schedule, dtype=torch.float64, device="cpu")
    f, pull_x = (x.new_empty(shape, dtype=torch.float64) for shape in (x.shape[:1], x.shape))
    g, pull_y = (f, pull_x) if same else (y.new_empty(shape, dtype=torch.float64) for shape in (y.shape[:1], y.shape))
    wanted = (pull_x, pull_y) if pulls else (None, None)
    tensors = (x, y, weights_x.contiguous(), weights_y.contiguous(), temperatures, f, g, *wanted)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    numbers = struct.pack("5q", len(x), len(y), x.shape[1], len(schedule), same)
    if found(numbers, struct.pack("10q", torch.get_num_threads(), *addresses), -math.inf, math.inf):
        raise MemoryError(NO_MEMORY)
    return (f, g, *wanted)
