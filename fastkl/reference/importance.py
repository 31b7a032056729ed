"""Importance weights w_l = p(x, z_l) / q(z_l | x): the bound on ln p(x) that they give, and how evenly they are spread.

A weight may be 0, its logarithm -inf: where all of them are, nothing is known of p(x) but the bound -inf, no sample
counts, and no gradient is handed back (that of torch.logsumexp is NaN there).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype


def _relative(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln of the largest weight, and relative to it: ln of the weights, the weights, and their sum.

    The largest is a constant, for the results are the same whatever it is. The sum is 1 or more, but 1/2 and without
    gradient where there is no weight at all: neither its logarithm nor its quotients are NaN then.
    """
    log_w = log_w.to(compute_dtype(log_w))
    largest = log_w.detach().amax(dim, keepdim=True)
    finite = torch.finfo(log_w.dtype)
    log_w = log_w - largest.clamp(finite.min, finite.max)  # inf - inf would be NaN
    weights = log_w.exp()
    return largest.squeeze(dim), log_w, weights, weights.sum(dim).clamp(min=0.5)


def iwae(log_w, dim=0) -> Tensor:
    """ln 1/L sum_l w_l."""
    largest, _, _, total = _relative(log_w, dim)
    return (total / log_w.shape[dim]).log() + largest


def effective_sample_size(log_w, dim=0) -> Tensor:
    """(sum_l w_l)^2 / sum_l w_l^2."""
    _, _, weights, total = _relative(log_w, dim)
    squares = weights.square().sum(dim)
    return (total.square() / squares.clamp(min=1.0)).masked_fill(squares == 0, 0.0)


def weight_entropy(log_w, dim=0) -> Tensor:
    """-sum_l v_l ln v_l, v = w / sum_l w_l."""
    _, log_w, weights, total = _relative(log_w, dim)
    surprise = weights * log_w.masked_fill(weights == 0, 0.0)  # 0 ln 0 = 0
    return total.clamp(min=1.0).log() - surprise.sum(dim) / total


def importance_weights(log_w, dim=0) -> Tensor:
    """w / sum_l w_l; 0 where all are."""
    _, _, weights, total = _relative(log_w, dim)
    return weights / total.unsqueeze(dim)
