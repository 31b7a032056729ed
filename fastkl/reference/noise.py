"""Noise that is a function of a seed: Philox, and normal numbers from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Stream:
    """The last word of the Philox counter, one per use, so that ops given one seed draw independent noise.

    None is 0, which torch's own generator uses on a GPU, where its key is a seed too.
    """

    POSTERIOR = 1  # rsample_normal, rsample_kl and kl_gmm, which must draw the same samples of q
    GUMBEL = 2  # gumbel_softmax
    DIRECTIONS = 3  # sliced_wasserstein
    PRIOR = 4  # samples of a prior that is one Gaussian
    RELAXED_CHOICE = 5  # rsample_gmm: the component
    RELAXED_NOISE = 6  # and the noise
    CHOICE = 7  # sample_gmm: the component
    CHOICE_NOISE = 8  # and the noise
    KL_CHOICE = 9  # the component of a mixture prior's relaxed KL


def philox(
    seed: Tensor, low: Tensor, high: Tensor, sample: Tensor | int, stream: int, rounds: int = 7
) -> tuple[Tensor, ...]:
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in int64 that hold 32-bit words.

    The counter is (low, high, sample, stream), the key is the seed's two halves. Seven rounds pass BigCrush.
    """
    mask = 0xFFFFFFFF
    key_0, key_1 = seed & mask, (seed >> 32) & mask
    word_0, word_1, word_2, word_3 = low, high, torch.zeros_like(low) + sample, torch.zeros_like(low) + stream
    for _ in range(rounds):
        # int64 wraps around, which keeps the low bits of the product correct.
        product_0, product_2 = word_0 * 0xD2511F53, word_2 * 0xCD9E8D57
        word_0 = (product_2 >> 32) & mask ^ word_1 ^ key_0
        word_1 = product_2 & mask
        word_2 = (product_0 >> 32) & mask ^ word_3 ^ key_1
        word_3 = product_0 & mask
        key_0, key_1 = (key_0 + 0x9E3779B9) & mask, (key_1 + 0xBB67AE85) & mask
    return word_0, word_1, word_2, word_3


def box_muller(word_0: Tensor, word_1: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words -> two independent float32 standard normals.

    The radius takes (w + 1/2) / 2^32, which is never 0 (so |eps| < 6.8); the angle is 2 pi w / 2^32.
    """
    radius = (-2.0 * torch.log(word_0.float() * 2.0**-32 + 2.0**-33)).sqrt()
    signed = word_1 - ((word_1 >> 31) << 32)  # the same angle modulo 2 pi, in [-pi, pi), where float32 is more precise
    angle = signed.float() * (2.0 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def normal_noise(
    seed: Tensor, shape: torch.Size | tuple[int, ...], num_samples: int | None = None, first_sample: int = 0,
    stream: int = Stream.POSTERIOR, first: int = 0,
) -> Tensor:  # fmt: skip
    """The noise of `seed`, the same on every device: float32, [*shape] or [num_samples, *shape].

    Element i of a sample, counted in row-major order from `first` on, is normal i % 4 of the Philox counter
    (i // 4, sample, stream).
    """
    skipped, count = first % 4, math.prod(shape)
    group = torch.arange(first // 4, (first + count + 3) // 4, device=seed.device)
    samples = []
    for sample in range(first_sample, first_sample + (1 if num_samples is None else num_samples)):
        words = philox(seed, group & 0xFFFFFFFF, group >> 32, sample, stream)
        normals = [*box_muller(words[0], words[1]), *box_muller(words[2], words[3])]
        samples.append(torch.stack(normals, dim=-1).flatten()[skipped : skipped + count].reshape(shape))
    if num_samples is None:
        return samples[0]
    return torch.stack(samples) if samples else torch.empty((0, *shape), dtype=torch.float32, device=seed.device)
