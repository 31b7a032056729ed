"""Random words once more, in NumPy: Philox4x32-7 as its authors write it (Salmon et al. 2011)."""

from __future__ import annotations

import numpy as np

CHOICE = 7  # the stream from which a mixture's components are drawn


def philox(seed: int, count: int, stream: int) -> list[np.ndarray]:
    """Four words for each of the counters (0, 0, 0, stream), (1, 0, 0, stream), ..."""
    seed %= 1 << 64
    zero = np.zeros(count, dtype=np.uint64)
    words = [np.arange(count, dtype=np.uint64), zero, zero, zero + np.uint64(stream)]
    keys, low, half = [seed & 0xFFFFFFFF, seed >> 32], np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(7):
        first, third = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [third >> half ^ words[1] ^ np.uint64(keys[0]), third & low,
                 first >> half ^ words[3] ^ np.uint64(keys[1]), first & low]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


def uniform(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """In [0, 1), of 53 bits, by which components are chosen."""
    words = philox(seed, int(np.prod(shape)), CHOICE)
    bits = (words[0] << np.uint64(32) | words[1]) >> np.uint64(11)
    return (bits.astype(np.float64) * 2.0**-53).reshape(shape)
