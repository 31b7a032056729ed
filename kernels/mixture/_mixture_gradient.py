"""Gradients of the ops on a mixture that all rows share, as moments weighted by responsibilities.

Two deterministic kernels: by rows, for z, its log-variance and per-row logits; by components, for the parameters. Each
recomputes the distances of a tile, then loops over the dimensions a second time. A sum that is split over programs has
partial sums, of at most PARTIAL_BYTES in all, which are added in a fixed order.

At N = 1024, K = 128, D = 64 forward and backward move 6.15 units of z, of which 4 are z three times and dz. The rest
does not grow with N: parameters prepared for each direction (2 x 0.5; only ln p is saved for backward), read by three
kernels (0.75), their gradients (0.25), and per-row numbers (0.15).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkl.kernels._layout import clear, compute_dtype, present
from fastkl.kernels.mixture._mixture_components import by_components
from fastkl.kernels.mixture._mixture_prepare import prepare
from fastkl.kernels.mixture._mixture_rows import Given, by_rows


def gradients(
    given: Given, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None],
    outputs: Sequence[Tensor | None], form: str,
) -> None:  # fmt: skip
    """Write (dz, dlogvar, dlogits, dmeans, dlogvars); None is not wanted. inputs: (z, logvar, logits, means, logvars).
    `given` is (dlp, lp, dlog_r, log_r); dlp may also be the sums of dlog_r."""
    z, logvar, logits, means, logvars = inputs
    dz, dlogvar, dlogits, dmeans, dlogvars = outputs
    if z.shape[0] == 0:
        return clear(outputs)
    dtype = compute_dtype(inputs)
    mixture = prepare(logits, means, logvars, form, dtype)
    own, shared = (dlogits, None) if logits.shape[0] > 1 else (None, dlogits)
    if present((dz, dlogvar, own)):
        by_rows(given, z, logvar, logits, means.shape[1], mixture, form, (dz, dlogvar, own))
    if present((shared, dmeans, dlogvars)):
        kind = "convolved" if form == "convolved" else "gradient"
        counts = by_components(given, *inputs, mixture, form, kind, dmeans, dlogvars)
        if shared is not None:
            if given[2] is None:
                counts -= torch.softmax(logits[0].to(dtype), 0) * given[0].sum(dtype=dtype)
            shared.copy_(counts)
    return None
