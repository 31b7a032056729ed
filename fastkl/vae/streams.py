"""Random numbers as a function of (seed, purpose, step, ...), independent of earlier draws.

Every step reseeds torch from its number, so the step number determines the state of all generators. A killed run
therefore continues bit for bit from a checkpoint without generator states, and an evaluation in between does not shift
the training noise. A new op that draws from any of torch's generators needs no change here.
"""

from __future__ import annotations

import functools
import zlib

import numpy as np
import torch
from torch import Tensor


def seed_for(seed: int, purpose: str, *numbers: int) -> int:
    """A 32-bit seed for one purpose; SeedSequence keeps neighbouring steps and purposes independent."""
    entropy = [seed, zlib.crc32(purpose.encode()), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A separate CPU generator; torch's global one is not touched."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *numbers))


def uniform(seed: int, purpose: str, *numbers: int, count: int) -> np.ndarray:
    """Numbers [count] from 0 to 1."""
    entropy = [seed, zlib.crc32(purpose.encode()), *numbers]
    return np.random.default_rng(entropy).random(count)


def batch_indices(seed: int, step: int, count: int, batch: int) -> Tensor:
    """The data of one step. Each epoch has a new shuffle and skips the last, incomplete batch."""
    epoch, position = divmod(step, count // batch)
    return order(seed, epoch, count)[position * batch : (position + 1) * batch]


@functools.lru_cache(maxsize=1)  # a shuffle of many data takes longer than a step
def order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch), dtype=torch.int64, device="cpu")
