"""Arguments of mmd_normal.c: MMD of posteriors."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastkl.native._pack import function

MOST_SCALES = 16  # as in mmd_normal.c


def mmd_posteriors(mu: Tensor, logvar: Tensor, scales: list[float], unbiased: bool, dmu: bool, dlogvar: bool):
    """[the sum over pairs in float64, the wanted gradients], or NotImplemented."""
    dtype = torch.float64 if torch.float64 in (mu.dtype, logvar.dtype) else torch.float32
    found = function("mmd_normal", "mmd_normal", dtype)
    if found is None or len(scales) > MOST_SCALES or not mu.numel():
        return NotImplemented
    (rows, size), count = mu.shape, len(scales)
    mean, variance = mu.to(dtype).T.contiguous(), logvar.to(dtype).exp().T.contiguous()
    gradients = [torch.empty_like(mean) for _ in range(2)] if dmu or dlogvar else []
    sums, total = (mu.new_empty(shape, dtype=torch.float64) for shape in ((rows,), ()))
    outputs = [gradient.data_ptr() for gradient in gradients] or [0, 0]
    addresses = [mean.data_ptr(), variance.data_ptr(), *outputs, sums.data_ptr(), total.data_ptr()]
    numbers = struct.pack(f"4q{count}d", rows, size, unbiased, count, *(1 / (size * s) for s in scales))
    found(numbers, struct.pack("7q", torch.get_num_threads(), *addresses), 0.0, 0.0)
    if dlogvar:
        gradients[1] *= variance
    return [total, *(gradient.T.contiguous() for want, gradient in zip((dmu, dlogvar), gradients) if want)]
