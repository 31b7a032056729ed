"""Random numbers as a function of (seed, purpose, step, ...), not of what was drawn before.

Every step reseeds torch from its own number, so the state of all generators is known from the step number alone: a run
that was killed continues bit for bit from a checkpoint that holds no generator state, an evaluation in between cannot
shift the training noise, and a later op that draws from any of torch's generators is covered without a change here.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def seed_for(seed: int, purpose: str, *numbers: int) -> int:
    """A 32-bit seed for one purpose; SeedSequence keeps neighbouring steps and purposes independent."""
    entropy = [seed, zlib.crc32(purpose.encode()), *numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator of its own, which leaves torch's global one alone."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, *numbers))


def batch_indices(seed: int, step: int, count: int, batch: int) -> Tensor:
    """The data of one step: a fresh shuffle each epoch, the rest that does not fill a batch left for another epoch."""
    steps_per_epoch = count // batch
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(count, generator=generator(seed, "order", epoch), dtype=torch.int64, device="cpu")
    return order[position * batch : (position + 1) * batch]
