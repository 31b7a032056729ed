"""Training data that are read, cropped, flipped and scaled when they are used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.vae import streams
from fastkl.vae.data.arrays import Lazy
from fastkl.vae.data.image_sets import CENTRE, Crops
from fastkl.vae.data.scaling import Scaling

# Limits of held-out data, which stay in memory: rows and numbers.
HELD, HELD_NUMBERS = 10_000, 2**28
COMPARED = 32  # data whose values are part of the fingerprint


@dataclass(frozen=True)
class Stored:
    """Data [N, ...] in float32 in the numbers of the model, some rows of a source that need not fit into the memory.

    `stored[indices]` are the data as in the first epoch, and `view` those of any epoch. The crop and the flip of a
    datum are functions of the seed, the epoch and its index, so they depend neither on the batch nor on the process.

    Args:
        source: an array [M, ...], in memory or lazy.
        rows: the rows [N] of the source.
        size: pixels a side to which whole images are resized (0: as they are).
        flip: whether each image is mirrored with probability 1/2.
        random: whether `Crops` are at random places, or all in the centre; without it nothing is flipped.
    """

    source: Any
    rows: np.ndarray
    scaling: Scaling
    size: int = 0
    flip: bool = False
    random: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (len(self.rows), *self.source.shape[1:])
        return (*shape[:2], self.size, self.size) if self.size and len(shape) == 4 else shape

    def __getitem__(self, key: Any) -> Tensor:
        return self.view(np.arange(len(self))[key], 0)

    def view(self, indices: np.ndarray | Tensor, epoch: int) -> Tensor:
        """Data [n, ...] as in an epoch.

        Raises:
            UserError: a datum cannot be read; the message names its file.
        """
        indices = np.asarray(indices)
        rows = self.rows[indices]
        # Two numbers for the place of the crop, and one for the flip.
        chances = np.full((len(rows), 3), CENTRE)
        if self.random and (self.flip or isinstance(self.source, Crops)):
            for chance, index in zip(chances, indices.tolist()):
                chance[:] = streams.uniform(self.seed, "crop", epoch, index, count=3)
        cropped = isinstance(self.source, Crops)
        values = self.source.random(rows, chances[:, :2]) if cropped else self.source[rows]
        x = self.scaling.resize(self.scaling.apply(values, rows), self.size)
        if self.flip and self.random:
            turned = torch.from_numpy(chances[:, 2] < 0.5)
            x[turned] = x[turned].flip(-1)
        return x

    @property
    def identity(self) -> bytes:
        """Bytes that tell these data from others: the names of files, and values of a few rows. The other values are
        not read, so that a mended file may replace a damaged one."""
        names = self.source.identity if isinstance(self.source, Lazy) else b""
        some = np.unique(np.linspace(0, len(self) - 1, COMPARED).astype(int))
        return names + self.rows[some].tobytes() + self[some].numpy().tobytes()


def held(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As many rows of data of this shape as are held in memory."""
    return rows[: max(1, min(HELD, HELD_NUMBERS // math.prod(shape)))]
