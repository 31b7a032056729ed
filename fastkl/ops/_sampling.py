"""What the sampling ops share: where their noise comes from. Randomness belongs to torch; an op gets a seed tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._gradients import unpack


def check_noise(
    seed: int | Tensor | None, eps: Tensor | None, num_samples: int | None, shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, eps), one of which is None: eps expanded to its full shape, or a seed tensor on `device`.

    Without either, the seed is drawn by torch.randint on the device: it obeys torch.manual_seed, needs no
    synchronisation, and is drawn again alike by activation checkpointing and in each replay of a CUDA graph.
    """
    if num_samples is not None:
        arguments.check_int("num_samples", num_samples, 1)
    if eps is not None:
        if seed is not None:
            raise ValueError("seed and eps exclude each other: eps is the noise itself")
        full = shape if num_samples is None else torch.Size((num_samples, *shape))
        if arguments.broadcast_shape(eps=eps, expected_noise=torch.empty(full, device="meta")) != full:
            raise ValueError(f"eps must have the shape of the samples, {tuple(full)}, got {tuple(eps.shape)}")
        return None, eps.expand(full)
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device), None
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"seed must be an int64 tensor without dimensions, got {seed.dtype} {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}, but mu is on {device}; move one of them")
        return seed, None
    arguments.check_int("seed", seed, -(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device), None


def noise(q: list[Tensor], packed_dim: int, seed: Tensor | None, eps: Tensor | None, num_samples: int | None) -> Tensor:
    return reference.normal_noise(seed, unpack(q, packed_dim)[0].shape, num_samples) if eps is None else eps


def noise_gradient(dz: Tensor, q: list[Tensor], packed_dim: int, eps: Tensor, scale: str, bounds) -> Tensor:
    """d/d eps: only for who learns the noise, so not fused."""
    parameter = unpack(q, packed_dim)[1].to(reference.compute_dtype(*q))
    logvar = reference.bound(reference.to_logvar(parameter, scale), bounds)
    return (dz * torch.exp(0.5 * logvar)).to(eps.dtype)


def batch_noise(info, q, packed_dim: int, dims, seed, eps, num_samples) -> tuple[Tensor | None, Tensor | None]:
    """(seed, eps) under vmap, for the op over a batch whose first dimension is the vmapped one."""
    seed_dim, eps_dim = dims
    if eps is None and seed_dim is not None:  # randomness="different": one seed for all is as different
        return seed.select(seed_dim, 0), None
    if eps is None:  # one seed, hence the same noise for every example
        shape = unpack(q, packed_dim)[0].shape[1:]
        eps, eps_dim = reference.normal_noise(seed, shape, num_samples), None
    eps = arguments.batch_first(eps, eps_dim, info.batch_size)
    return None, eps if num_samples is None else eps.movedim(0, 1)
