"""What the tests of mixtures share: inputs, and a function's value with its gradients."""

from __future__ import annotations

import torch

from helpers import DEVICE, leaf

BACKENDS = ("torch", "triton")
MIB = 1 << 20


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)


def triangles(*batch, size, seed=3):
    lower = 0.4 * draw(*batch, size, size, seed=seed).tril(-1)
    return lower + torch.diag_embed(0.5 + draw(*batch, size, seed=seed + 1).abs())


def ordinary():
    """(z, logits, means, logvars)."""
    return draw(40, 16), draw(20, seed=1), draw(20, 16, seed=2), draw(20, 16, seed=3, scale=0.5)


def gradients(function, *inputs):
    leaves = [leaf(tensor) for tensor in inputs]
    value = function(*leaves)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=DEVICE).view(value.shape)
    return value.detach(), torch.autograd.grad(value, leaves, weights)
