"""Importance weights w_l = p(x, z_l) / q(z_l | x): the bound on ln p(x) that they give, and how evenly they are spread.

A weight may be 0, its logarithm -inf: where all of them are, nothing is known of p(x) but the bound -inf, no sample
counts, and no gradient is handed back.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastkl.reference._parameters import compute_dtype


def _relative(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln of the weights relative to the largest, ln of the largest, the relative weights and their sum (0: there are
    none). The largest is a constant: whatever it is, the results are the same."""
    log_w = log_w.to(compute_dtype(log_w))
    largest = log_w.detach().amax(dim, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)  # inf - inf would be NaN
    log_w = log_w - largest
    weights = log_w.exp()
    return log_w, largest.squeeze(dim), weights, weights.sum(dim)


def iwae(log_w, dim=0) -> Tensor:
    """ln 1/L sum_l w_l."""
    _, largest, _, total = _relative(log_w, dim)
    none = total == 0
    bound = total.masked_fill(none, 1.0).log() + largest - math.log(log_w.shape[dim])
    return bound.masked_fill(none, -math.inf)


def effective_sample_size(log_w, dim=0) -> Tensor:
    """(sum_l w_l)^2 / sum_l w_l^2."""
    _, _, weights, total = _relative(log_w, dim)
    return total.square() / weights.square().sum(dim).masked_fill(total == 0, 1.0)


def weight_entropy(log_w, dim=0) -> Tensor:
    """-sum_l v_l ln v_l, v = w / sum_l w_l."""
    log_w, _, weights, total = _relative(log_w, dim)
    total = total.masked_fill(total == 0, 1.0)
    surprise = weights * log_w.masked_fill(weights == 0, 0.0)  # 0 ln 0 = 0
    return total.log() - surprise.sum(dim) / total


def importance_weights(log_w, dim=0) -> Tensor:
    """w / sum_l w_l; 0 where all are."""
    _, _, weights, total = _relative(log_w, dim)
    return weights / total.masked_fill(total == 0, 1.0).unsqueeze(dim)
