"""Log-likelihoods of data x, given a decoder's output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkl.reference._parameters import compute_dtype, standardise, sum_event, to_logvar, weighted


def bernoulli_log_prob(x, logits, *, event_ndim=None) -> Tensor:
    """x ln sigmoid(logits) + (1 - x) ln sigmoid(-logits) = x logits - softplus(logits), summed over the event."""
    dtype = compute_dtype(logits, x)
    logits, x = torch.broadcast_tensors(logits.to(dtype), x.to(dtype))
    against, low = _sides(logits)  # l > 0: (x - 1) l - softplus(-l), to avoid cancellation
    values = weighted(x - against, logits) - F.softplus(low)
    return sum_event(values, event_ndim)


def bernoulli_terms_gradient(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """d (x logits - softplus(logits)) / d (logits, x)."""
    against, low = _sides(logits)
    return (x - against) + (2 * against - 1) * torch.sigmoid(low), logits


def _sides(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(1 if the logit is above 0 else 0, -|logits| with derivative 1 at 0)."""
    return (logits > 0).to(logits.dtype), logits.clamp(max=0) - logits.relu()


def normal_log_prob(x, mean, logvar, *, event_ndim=None, scale="logvar") -> Tensor:
    """-1/2 [ln 2 pi + logvar + z^2] with z = (x - mean) exp(-logvar / 2), summed over the event."""
    dtype = compute_dtype(x, mean, logvar)
    x, mean, logvar = torch.broadcast_tensors(x.to(dtype), mean.to(dtype), to_logvar(logvar.to(dtype), scale))
    z, _ = standardise(x - mean, logvar)
    return sum_event(-0.5 * (math.log(2 * math.pi) + logvar + z * z), event_ndim)


def normal_terms_gradient(weight: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """weight d ln N(x; mean, exp(logvar)) / d (mean, logvar); d / d x = -d / d mean.

    The weight is multiplied first, because a small weight can keep an overflowing square finite. A weight of 0 gives 0
    even after an overflow.
    """
    z, root = standardise(x - mean, logvar)
    most = torch.finfo(z.dtype).max
    z = torch.where(weight == 0, z.clamp(-most, most), z)
    weighed = weight * z
    return weighed * root * root, 0.5 * (weighed * z - weight)
