"""Importance weights w_l = p(x, z_l) / q(z_l | x): the bound on ln p(x) that they give, and how even they are.

A weight may be 0 (ln w = -inf). If all weights are 0, the bound is -inf, the effective sample size is 0 and gradients
are 0 (torch.logsumexp's is NaN there).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype


def _relative(log_w: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ln of the largest weight; then, relative to it: ln of the weights, the weights, and their sum.

    The largest is detached, because the results do not depend on this reference. The sum is at least 1. If all weights
    are 0 it is 1/2 without gradient, so that neither its logarithm nor quotients are NaN.
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
    """w / sum_l w_l; 0 if all are 0."""
    _, _, weights, total = _relative(log_w, dim)
    return weights / total.unsqueeze(dim)
