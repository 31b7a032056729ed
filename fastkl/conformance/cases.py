"""The cases: inputs, exact values, and the mistake that each one detects.

`exact` was computed with mpmath to 50 digits; tests/test_conformance.py repeats this. Inputs are Python numbers that
float32, or the case's dtype, represents exactly or nearly; the exact values are those of the rounded inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    question: str  # a key of a library's answers
    name: str
    shows: str  # the mistake
    inputs: tuple[Any, ...]
    exact: tuple[float, ...]  # flat
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4

    def arguments(self) -> tuple[Any, ...]:
        return tuple(torch.tensor(x, dtype=self.dtype, device="cpu") if isinstance(x, list) else x for x in self.inputs)

    def values(self) -> Tensor:
        return torch.tensor(self.exact, dtype=torch.float64, device="cpu").reshape(self.shape)


def full(value: float, *shape: int) -> Any:
    """A nested list of this shape."""
    return value if not shape else [full(value, *shape[1:]) for _ in range(shape[0])]


HALF = torch.bfloat16

CASES = [
    Case("kl", "unit mean", "a missing factor 1/2", ([[1.0, 0.0]], [[0.0, 0.0]]), (0.5,), (1,)),
    Case("kl", "wide and narrow", "a sign, or variance for deviation",
         ([[0.0, 0.0]], [[1.0, -2.0]]), (0.926808555847829,), (1,)),
    Case("kl", "nearly the prior", "exp(x) - 1 - x by subtraction",
         ([full(0.0, 64)], [full(2.0**-10, 64)]), (1.526375732912777e-05,), (1,)),
    Case("kl", "nearly the prior, bfloat16", "differences rounded to 16 bits",
         ([full(0.0, 64)], [full(2.0**-5, 64)]), (0.01578903997128547,), (1,), HALF),
    Case("kl", "large mean, bfloat16", "sums rounded to 16 bits",
         ([full(0.125, 256)], [full(0.0, 256)]), (2.0,), (1,), HALF),
    Case("kl", "image", "one value for each datum", (full(1.0, 2, 3, 2, 2), full(0.0, 2, 3, 2, 2)), (6.0, 6.0), (2,)),
    Case("kl", "audio", "dimensions that are counted from the front",
         (full(1.0, 2, 3, 4), full(0.0, 2, 3, 4)), (6.0, 6.0), (2,)),
    Case("kl", "video", "the last dimension of five is not summed",
         (full(1.0, 2, 3, 2, 2, 4), full(0.0, 2, 3, 2, 2, 4)), (24.0, 24.0), (2,)),
    Case("mean kl", "image", "a mean over the pixels too", (full(1.0, 2, 3, 2, 2), full(0.0, 2, 3, 2, 2)), (6.0,), ()),
    Case("mean kl", "video", "a mean over the frames or columns too: each weighs as much as a datum",
         (full(1.0, 2, 3, 2, 2, 4), full(0.0, 2, 3, 2, 2, 4)), (24.0,), ()),
    Case("kl of std", "unit mean", "a missing factor 1/2", ([[1.0, 0.0]], [[1.0, 1.0]]), (0.5,), (1,)),
    Case("kl of std", "a deviation of 1e-30", "the logarithm of a square that is 0",
         ([[0.0]], [[1e-30]]), (68.57755278665029,), (1,)),
    Case("kl of std", "nearly the prior, bfloat16", "differences rounded to 16 bits",
         ([full(0.0, 64)], [full(1.03125, 64)]), (0.06186384532776394,), (1,), HALF),
    Case("kl of two", "the other way round", "the ratio of the variances upside down",
         ([[0.5]], [[0.0]], [[0.0]], [[1.0]]), (0.22992465073215146,), (1,)),
    Case("kl of two", "themselves", "a KL that is not 0", ([[3.0, -1.0]], [[2.0, -5.0]], [[3.0, -1.0]], [[2.0, -5.0]]),
         (0.0,), (1,)),
    Case("kl of two", "a narrow prior", "a variance that underflows",
         ([[0.0]], [[-90.0]], [[0.0]], [[-92.0]]), (2.194528049465325,), (1,)),
    Case("mixture", "far from all", "densities added, not log-densities",
         ([[40.0]], [0.5, 0.5], [[0.0], [1.0]], [[1.0], [1.0]]), (-762.1120857137646,), (1,)),
    Case("mixture", "a component of weight 0", "a weight of 0 that is replaced by a small one",
         ([[30.0]], [1.0, 0.0], [[0.0], [30.0]], [[1.0], [1.0]]), (-450.91893853320465,), (1,)),
    Case("mixture", "narrow components", "a variance that underflows",
         ([[0.0]], [0.25, 0.75], [[0.0], [1.0]], [[1e-25], [1e-25]]), (55.259394410985095,), (1,)),
    Case("iwae", "two samples", "weights over the wrong dimension", ([[[0.0, 2.0]]],), (1.4337808304830273,), (1, 1)),
    Case("iwae", "three repetitions of two samples", "weights over the wrong dimension",
         ([[[0.0, 2.0], [0.0, 0.0], [-4.0, 0.0]]],), (1.4337808304830273, 0.0, -0.6749972526421356), (1, 3)),
    Case("decomposition", "three data far apart", "the own posterior's weight in another's place",
         ([[-60.0], [0.0], [60.0]], [[-60.0], [0.0], [60.0]], [[0.0], [0.0], [0.0]], 30),
         (3.4011973816621555, 0.0, 1196.598802618338), (3,)),
    Case("choice", "temperature 0", "a division by 0", ([[0.0, 1.0, -1.0]], 0.0), (1.0,), (1,)),
    Case("choice", "a small temperature, float16", "scores beyond the dtype's range",
         ([[0.0, 1.0, -1.0]], 1e-4), (1.0,), (1,), torch.float16, 1e-3),
    Case("mmd", "two points each", "pairs of a point with itself in the unbiased estimate",
         ([[0.0], [0.0]], [[1.0], [1.0]]), (0.6666666666666666,), ()),
    Case("transport", "a shift", "a bias towards the mean",
         ([[0.0], [1.0]], [[3.0], [4.0]], 1e-3), (4.5,), (), torch.float32, 1e-3),
    Case("transport", "a sample and itself", "a divergence that is not 0",
         ([[0.0], [1.0]], [[0.0], [1.0]], 1.0), (0.0,), ()),
    Case("one dimension", "a shift", "a power or a root that is missing",
         ([[0.0], [1.0], [2.0]], [[2.0], [3.0], [5.0]]), (5.666666666666667,), ()),
]  # fmt: skip
