"""The statistics of expectation maximisation, [lp [R], counts [K], first [K, D], second [K, D]], by components."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.kernels._layout import compute_dtype
from fastkl.kernels.mixture._mixture_components import by_components
from fastkl.kernels.mixture._mixture_prepare import prepare
from fastkl.kernels.mixture.gmm_log_prob import launch_fwd


def fwd(z: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None) -> list[Tensor]:
    """counts = sum_n r, first = sum_n r (z - m), second = sum_n r (z - m)^2."""
    if scale_tril is not None:
        return NotImplemented
    lp = launch_fwd(z, None, logits, means, logvars, "point")
    dtype = compute_dtype((z, logits, means, logvars))
    if z.shape[0] == 0:
        zeros = torch.zeros(means.shape[1:], dtype=dtype, device=z.device)
        counts = torch.zeros(means.shape[1], dtype=dtype, device=z.device)
        return [lp.to(dtype), counts, zeros, zeros.clone()]
    mixture = prepare(logits, means, logvars, "point", dtype)
    ones = torch.ones((), dtype=dtype, device=z.device).expand(z.shape[0])
    given = (ones, lp, None, None)
    first, second = (torch.empty(means.shape, dtype=dtype, device=z.device) for _ in range(2))
    counts = by_components(given, z, None, logits, means, logvars, mixture, "point", "moments", first, second)
    return [lp.to(dtype), counts, first[0], second[0]]
