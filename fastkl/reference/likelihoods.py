"""Log-likelihoods of data: what a decoder's output says about x."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkl.reference._parameters import SOFTPLUS_THRESHOLD, compute_dtype, sum_event


def bernoulli_log_prob(logits, x, *, event_ndim=None) -> Tensor:
    """x ln sigmoid(logits) + (1 - x) ln sigmoid(-logits) = x logits - softplus(logits), summed over the event."""
    dtype = compute_dtype(logits, x)
    logits, x = torch.broadcast_tensors(logits.to(dtype), x.to(dtype))
    values = x * logits - F.softplus(logits, threshold=SOFTPLUS_THRESHOLD)
    return sum_event(values, logits.dim() - 1 if event_ndim is None else event_ndim)


def bernoulli_terms_gradient(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """d (x logits - softplus(logits)) / d (logits, x)."""
    return x - torch.sigmoid(logits), logits


def normal_log_prob(x, mean, logvar, *, event_ndim=None) -> Tensor:
    """-1/2 [ln 2 pi + logvar + z^2] with z = (x - mean) exp(-logvar / 2), summed over the event."""
    dtype = compute_dtype(x, mean, logvar)
    x, mean, logvar = torch.broadcast_tensors(x.to(dtype), mean.to(dtype), logvar.to(dtype))
    z = (x - mean) * torch.exp(-0.5 * logvar)  # squared last: 1 / sigma^2 alone overflows first
    return sum_event(-0.5 * (math.log(2 * math.pi) + logvar + z * z), x.dim() - 1 if event_ndim is None else event_ndim)


def normal_terms_gradient(x: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """d ln N(x; mean, exp(logvar)) / d (mean, logvar); d / d x = -d / d mean."""
    precision_root = torch.exp(-0.5 * logvar)
    z = (x - mean) * precision_root
    return z * precision_root, 0.5 * (z * z - 1)
