"""Noise for the sampling ops. Torch's generator provides a seed tensor; the noise is a function of the seed."""

from __future__ import annotations

import math
import sys
from typing import Union

import numpy as np
import torch
from torch import Tensor, distributed

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._fused import MOST_NOISE, is_fused
from fastkl.reference import Stream

# A number or a 0-d int64 tensor; or one of them and the rank whose noise is drawn instead of that of the caller's.
Seed = Union[int, Tensor, "tuple[int | Tensor, int]"]


def check_noise(
    seed: Seed | None, eps: Tensor | None, num_samples: int | None, shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """(seed, eps), one of which is None: eps expanded to its full shape, or a seed tensor on `device`.

    If neither is given, torch.randint draws the seed on the device: this obeys torch.manual_seed, needs no
    synchronisation, repeats under activation checkpointing, and is new in each replay of a CUDA graph. Inside
    torch.compile the noise of a small latent on a CPU is torch.randn, which the compiler fuses.
    """
    if num_samples is not None:
        num_samples = arguments.check_int("num_samples", num_samples, 1)
    full = shape if num_samples is None else torch.Size((num_samples, *shape))
    if seed is None and eps is None and is_fused(device, full.numel(), MOST_NOISE):
        return None, torch.randn(full, dtype=torch.float32, device=device)
    if eps is not None:
        if seed is not None:
            raise ValueError("seed and eps exclude each other: eps is the noise itself")
        if not arguments.fits(eps, full):
            raise ValueError(f"eps must have the shape of the samples, {tuple(full)}, got {tuple(eps.shape)}")
        return None, arguments.expand(eps, full)
    return check_seed(seed, device, "mu"), None


def check_seed(seed: Seed | None, device: torch.device, name: str) -> Tensor:
    """The seed as an int64 tensor on `device`, the device of the argument called `name`; drawn if it is None.

    A given seed is that of `of_rank`; the result r goes to another function as (r, 0), which leaves it as it is.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    seed = of_rank(seed)
    if not isinstance(seed, Tensor):
        return torch.full((), seed, dtype=torch.int64, device=device)
    if seed.device != device:
        raise ValueError(f"seed is on {seed.device}, but {name} is on {device}; move one of them")
    return seed


def of_rank(seed: Seed) -> int | Tensor:
    """The seed of this process, or of the rank in `seed`: other noise for each, for rank 0 that of the seed alone."""
    if isinstance(seed, tuple):
        if len(seed) != 2:
            raise ValueError(f"seed must be one seed, or (seed, rank), got {len(seed)} entries")
        number, rank = seed
        arguments.check_int("rank, the second entry of seed,", rank, 0)
    else:
        number = seed
        rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    if isinstance(number, Tensor):
        arguments.check_dense("seed", number)
        if number.dtype != torch.int64 or number.dim() != 0:
            raise TypeError(
                f"seed must be an int64 tensor without dimensions, got {number.dtype} {tuple(number.shape)}"
            )
    else:
        number = arguments.check_int("seed", number, -(2**63))
        if number >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {number}")
    # Multiples of 2**64 / the golden ratio are far apart: no neighbour of a seed gives another rank's noise.
    return number if rank == 0 else number ^ ((int(rank) * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63)


def running_sum(values: Tensor) -> Tensor:
    """values.cumsum(-1), deterministic: CUDA's scan of a single row adds in a varying order."""
    if values.device.type == "cpu":
        return values.cumsum(-1)
    rows = values.reshape(-1, values.shape[-1])
    return torch.cat([rows, rows[:1]]).cumsum(-1)[:-1].view(values.shape)


def noise(
    shape: torch.Size, eps: Tensor | None, seed: Tensor | None, num_samples: int | None, stream: int = Stream.POSTERIOR
) -> Tensor:
    """The noise in torch ops, for any device and for second derivatives."""
    if eps is not None:
        return eps
    assert seed is not None
    return reference.normal_noise(seed, shape, num_samples, stream=stream)


def draw(
    shape: torch.Size, eps: Tensor | None, seed: Tensor | None, num_samples: int | None, stream: int = Stream.POSTERIOR
) -> Tensor:
    """The noise inside an op; on a CPU the same as reference.normal_noise, about ten times faster."""
    if eps is not None:
        return eps
    assert seed is not None
    if seed.device.type != "cpu":
        return noise(shape, eps, seed, num_samples, stream)
    samples = range(1 if num_samples is None else num_samples)
    out = normals(seed, samples, 0, shape.numel(), stream)
    return out.reshape(shape if num_samples is None else (num_samples, *shape))


def normals(seed: Tensor, samples: range, first: int, last: int, stream: int = Stream.POSTERIOR) -> Tensor:
    """reference.normal_noise of some samples, elements first to last in row-major order: [samples, last - first]."""
    if seed.device.type != "cpu":
        return reference.normal_noise(seed, (last - first,), len(samples), samples.start, stream, first)
    start, groups = first // 4, (last + 3) // 4
    shape = (len(samples), groups - start, 2, 2)  # two Box-Muller pairs per Philox call
    out = torch.empty(shape, dtype=torch.float32, device=seed.device)
    together = max(1, GROUPS // max(1, groups - start))  # small samples are drawn several at a time
    for index in range(0, len(samples), together):
        numbers = np.array(samples[index : index + together])
        for begin in range(start, groups, GROUPS):
            group = np.arange(begin, min(groups, begin + GROUPS))
            words = _philox(int(seed.item()), np.tile(group, len(numbers)), np.repeat(numbers, len(group)), stream)
            # float32(word) rounds as in the kernel. The angle's word is signed, which gives the same angle modulo 2 pi.
            radius, angle = (torch.from_numpy(word.astype(np.float32)) for word in (words[0], words[1].view(np.int32)))
            radius.mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
            angle.mul_(2.0 * math.pi * 2.0**-32)
            target = out[index : index + len(numbers), begin - start : begin - start + len(group)]
            pairs = target.permute(2, 0, 1, 3)  # [2, samples, groups, 2]
            radius, angle = radius.view(pairs.shape[:3]), angle.view(pairs.shape[:3])
            torch.mul(radius, angle.cos(), out=pairs[..., 0])
            torch.mul(radius, angle.sin_(), out=pairs[..., 1])
    return out.view(len(samples), -1)[:, first - 4 * start : last - 4 * start]


def draw_gumbel(seed: Tensor, shape: torch.Size, stream: int) -> Tensor:
    """The same as reference.gumbel_noise, much faster on a CPU."""
    if seed.device.type != "cpu":
        return reference.gumbel_noise(seed, shape, stream)
    count = shape.numel()
    groups = (count + 3) // 4
    out = torch.empty(groups, 2, 2, dtype=torch.float32, device=seed.device)
    for first in range(0, groups, GROUPS):
        last = min(groups, first + GROUPS)
        for pair, words in enumerate(_philox(int(seed.item()), np.arange(first, last), 0, stream)):
            # The distance from the nearer end, so that u is as fine near 1 as near 0.
            signed = torch.from_numpy(words.view(np.int32))
            tail = (signed ^ (signed >> 31)).float().mul_(2.0**-32).add_(2.0**-33)  # u or 1 - u, at most 1/2
            upper = signed < 0
            u = torch.where(upper, 1.0 - tail, tail)
            rounding = u.sub(1.0).add_(tail).mul_(upper)  # rounding error of 1 - tail, which matters for ln u near 1
            out[first:last, :, pair] = rounding.sub_(u.log_()).log_().neg_().T
    return out.view(-1)[:count].view(shape)


# Philox calls per block: their words fit the CPU cache.
GROUPS = 16384
ROUNDS = 7  # as in reference.philox
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)


def _philox(seed: int, group: np.ndarray, sample: int | np.ndarray, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """reference.philox in 32-bit words: (0, 2) and (1, 3), [2, groups] each."""
    even, odd = np.zeros((2, len(group)), np.uint32), np.zeros((2, len(group)), np.uint32)
    even[0], odd[0], even[1], odd[1] = group & 0xFFFFFFFF, group >> 32, sample, stream
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    products = [np.empty((2, len(group)), np.uint64) for _ in range(2)]
    for step in range(ROUNDS):
        halves = np.multiply(even, _MULTIPLIERS, out=products[step % 2]).view(np.uint32)[::-1]
        even = halves[:, HIGH::2] ^ odd
        even ^= np.array(key, np.uint32)[:, None]
        odd = halves[:, 1 - HIGH :: 2]  # a view, overwritten by the product after next
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return even, np.ascontiguousarray(odd)


HIGH = 1 if sys.byteorder == "little" else 0


def noise_gradient(dz: Tensor, mu: Tensor, parameter: Tensor, eps: Tensor, scale: str, bounds) -> Tensor:
    """The gradient in eps. Needed only when the noise itself is learned, so not fused."""
    parameter = parameter.to(reference.compute_dtype(mu, parameter))
    logvar = reference.bound(reference.to_logvar(parameter, scale), bounds)
    return (dz * torch.exp(0.5 * logvar)).to(eps.dtype)


def batch_noise(
    size: int, shape: torch.Size, eps: Tensor | None, seed: Tensor | None, dims, num_samples: int | None, stream: int
) -> tuple[Tensor, None]:
    """(eps, seed) under vmap, for one op call whose first dimension is the vmapped one. `shape` is one example's."""
    eps_dim, seed_dim = dims
    if eps is None:  # one seed, hence the same noise, for all examples, or one each
        assert seed is not None
        seeds = [seed] if seed_dim is None else seed.unbind(seed_dim)
        drawn = [reference.normal_noise(each, shape, num_samples, stream=stream) for each in seeds]
        eps, eps_dim = (drawn[0], None) if seed_dim is None else (torch.stack(drawn), 0)
    eps = arguments.batch_first(eps, eps_dim, size)
    return (eps if num_samples is None else eps.movedim(0, 1)), None
