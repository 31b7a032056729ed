"""Relaxed discrete sampling: Gumbel noise and the relaxed one-hot vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype
from fastkl.reference.noise import Stream, philox


def gumbel_noise(seed: Tensor, shape: torch.Size | tuple[int, ...], stream: int = Stream.GUMBEL) -> Tensor:
    """-ln(-ln u), u = (w + 1/2) / 2^32 with w the Philox word i % 4 of the counter (i // 4, 0, stream); float32.

    In float32, u below 1/2 is (w + 1/2) 2^-32; above, -ln u is -ln(1 - v) with v = (2^32 - 1 - w + 1/2) 2^-32. So both
    tails keep their relative precision, and the noise is always finite.
    """
    count = math.prod(shape)
    group = torch.arange((count + 3) // 4, device=seed.device)
    words = philox(seed, group & 0xFFFFFFFF, group >> 32, 0, stream)
    word = torch.stack(words, -1).flatten()[:count].reshape(shape)
    low = word < 2**31
    u = word.float() * 2.0**-32 + 2.0**-33
    v = (0xFFFFFFFF - word).float() * 2.0**-32 + 2.0**-33
    return -torch.log(torch.where(low, -torch.log(u), -torch.log1p(-v)))


def relaxed_one_hot(perturbed, tau, hard=False, dim=-1) -> Tensor:
    """softmax(perturbed / tau); at tau = 0 its limit, one-hot at the first maximum, with gradient 0.

    With `hard` the value is one-hot and the gradient is the softmax's. Entries of -inf get 0, even if all are -inf, and
    cause no NaN in any gradient. A tau below 0 or NaN gives NaN.
    """
    dtype, infinity = perturbed.dtype, float("inf")
    tau = torch.as_tensor(tau, dtype=dtype, device=perturbed.device)
    masked = perturbed == -infinity
    top = perturbed.detach().amax(dim, keepdim=True)
    shifted = (perturbed - top.masked_fill(top == -infinity, 0.0)).masked_fill(masked, 0.0)
    positive = tau.clamp(min=torch.finfo(dtype).tiny).masked_fill(tau == 0, 1.0).masked_fill(~(tau >= 0), math.nan)
    weights = torch.exp(shifted / positive).masked_fill(masked, 0.0)
    total = weights.sum(dim, keepdim=True)
    soft = weights / total.masked_fill(total == 0, 1.0)
    one_hot = torch.zeros_like(perturbed).scatter(dim, perturbed.argmax(dim, keepdim=True), 1.0)
    one_hot = one_hot.masked_fill(total == 0, 0.0).masked_fill(total.isnan(), math.nan)
    soft = torch.where(tau == 0, one_hot, soft)
    return one_hot + (soft - soft.detach()) if hard else soft


def gumbel_softmax(logits, tau=1.0, hard=False, dim=-1, *, seed) -> Tensor:
    """relaxed_one_hot(logits + g, tau, hard) with g standard Gumbel noise, in the logits' dtype."""
    noise = gumbel_noise(seed, logits.shape)
    return relaxed_one_hot(logits.to(compute_dtype(logits)) + noise, tau, hard, dim).to(logits.dtype)
