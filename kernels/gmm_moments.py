"""The statistics that EM needs, [lp [R], counts [K], first [K, D], second [K, D]], from the component kernel."""

from __future__ import annotations

import torch

from fastkl.kernels._mixture import prepare
from fastkl.kernels._mixture_gradient import by_components
from fastkl.kernels.gmm_log_prob import launch_fwd
from fastkl.kernels.gmm_responsibilities import refuse


def fwd(z, logits, means, logvars, scale_tril, precision):
    """counts = sum_n r, first = sum_n r (z - m), second = sum_n r (z - m)^2."""
    refuse(means, scale_tril, precision)
    lp, _ = launch_fwd(z, None, logits, means, logvars, "point")
    dtype = lp.dtype
    if z.shape[0] == 0:
        zeros = torch.zeros(means.shape[1:], dtype=dtype, device=z.device)
        counts = torch.zeros(means.shape[1], dtype=dtype, device=z.device)
        return [lp, counts, zeros, zeros.clone()]
    mixture = prepare(logits, means, logvars, "point", dtype)
    ones = torch.ones((), dtype=dtype, device=z.device).expand(z.shape[0])
    given = (ones, lp, None, None)
    counts, first, second = by_components(
        given, z, None, logits, means, logvars, mixture, "point", "moments", second=True
    )  # fmt: skip
    return [lp, counts, first[0], second[0]]
