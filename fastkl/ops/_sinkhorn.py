"""Sinkhorn's algorithm between two weighted sets of points for the cost |x - y|^2 / 2, with nothing of size N x M kept.

Potentials f [N] and g [M] are updated together, at decreasing temperatures eps:
f_i <- -eps ln sum_j b_j exp((g_j - C_ij) / eps), and g alike. `Products` does so on a CPU, `Softmin` everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.ops import _gmm

# A tile of exponents: its rows and columns, whose float64 and float32 values together stay in a cache.
TILE = (256, 1024)
# |x|^2 / eps up to which exponents may be products in float32, off by 2^-23 of that.
FLOAT32_LIMIT = 300.0
# Exponents are taken to be at least this, and sums in between these limits are then right: in float32, and in float64.
LEAST = {torch.float32: -60.0, torch.float64: -600.0}
SUMS = {torch.float32: (1e-20, 1e20), torch.float64: (1e-200, 1e200)}


class Points(NamedTuple):
    """Where the points are [N, D], and their weights [N]."""

    at: Tensor
    weights: Tensor


class Softmin:
    """Updates by the mixture log-density: -eps ln sum_j exp(h_j - |x - y_j|^2 / (2 eps)) with components at y."""

    def __init__(self, x: Points, y: Points):
        self.x, self.y = x, y

    def _one(self, source: Points, target: Points, potential: Tensor, eps: float, pulls: bool):
        dimensions, shift = source.at.shape[1], potential.mean()
        logits = target.weights.log() + ((potential - shift) / eps).to(source.at.dtype)  # small, where float32 is fine
        logvars = logits.new_full((1, 1, 1), math.log(eps))
        mixture = (source.at, None, logits[None], target.at[None], logvars, None, "point", "exact")
        lp, wide = _gmm.gmm_log_prob_fwd(*mixture, 1)
        new = -eps * (lp + 0.5 * dimensions * math.log(2 * math.pi * eps) + logits.logsumexp(0)) - shift
        if not pulls:
            return new, None
        (gradient,) = _gmm.gmm_log_prob_bwd(torch.ones_like(lp), [wide], *mixture, True, False)
        return new, -eps * gradient

    def update(self, f: Tensor, g: Tensor, eps: float, pulls: bool = False):
        """(new f, new g, x_i - sum_j pi_ij y_j, the same for y), the latter where `pulls` are wanted."""
        new_f, pull_x = self._one(self.x, self.y, g, eps, pulls)
        if self.x is self.y:
            return new_f, new_f, pull_x, pull_x
        new_g, pull_y = self._one(self.y, self.x, f, eps, pulls)
        return new_f, new_g, pull_x, pull_y


class Products(Softmin):
    """Both updates from one matrix of exp((f_i + g_j - C_ij) / eps), tile by tile: its exponents are one product of
    matrices, its rows and columns sum to exp((f - new f) / eps) and exp((g - new g) / eps). Among the same points half
    of the tiles will do.

    The sums may underflow or overflow where the potentials are far from their update, in float32 more often than in
    float64; `Softmin` then makes that one.
    """

    def __init__(self, x: Points, y: Points, centre: Tensor):
        super().__init__(x, y)
        self.dtype = x.at.dtype
        self.places = [(points.at.double() - centre) for points in (x, y)]
        self.halves = [0.5 * at.square().sum(1) for at in self.places]
        self.radius = max(half.max().item() for half in self.halves)
        self.buffers: dict[torch.dtype, Tensor] = {}

    def update(self, f: Tensor, g: Tensor, eps: float, pulls: bool = False):
        wide = self.dtype == torch.float64 or pulls or self.radius > FLOAT32_LIMIT * eps
        factors = self._factors(f, g, eps, torch.float64 if wide else torch.float32)
        for dtype in dict.fromkeys((self.dtype, torch.float64)):
            rows, columns = self._sums(*factors, dtype, pulls)
            bounds = torch.stack([*rows[:, 0].aminmax(), *columns[:, 0].aminmax()])
            if ((bounds > SUMS[dtype][0]) & (bounds < SUMS[dtype][1])).all():
                break
        else:
            return super().update(f, g, eps, pulls)
        found = []
        for potential, total, at in zip((f, g), (rows, columns), self.places):
            found.append((potential - eps * total[:, 0].log(), at - total[:, 1:] / total[:, :1] if pulls else None))
        (new_f, pull_x), (new_g, pull_y) = found
        return new_f, new_g, pull_x, pull_y

    def _sums(self, left: Tensor, right: Tensor, dtype: torch.dtype, pulls: bool) -> tuple[Tensor, Tensor]:
        """Of the matrix's rows over what each y carries, and of its columns over what each x does."""
        same = self.x is self.y
        carry_x, carry_y = (
            self._carried(points, at, pulls).to(dtype) for points, at in zip((self.x, self.y), self.places)
        )
        rows = torch.zeros_like(carry_x, dtype=torch.float64)
        columns = rows if same else torch.zeros_like(carry_y, dtype=torch.float64)
        for i in range(0, len(left), TILE[0]):
            down = slice(i, i + TILE[0])
            for j in range(i if same else 0, len(right), TILE[1]):
                across = slice(j, j + TILE[1])
                plan = self._exponentials(left[down], right[across], dtype)
                rows[down] += plan @ carry_y[across]
                if not same:
                    columns[across] += plan.T @ carry_x[down]
                elif across.stop > down.stop:  # the tile's part beyond the block of rows, mirrored
                    beyond = max(0, down.stop - j)
                    columns[j + beyond : across.stop] += plan[:, beyond:].T @ carry_x[down]
        return rows, columns

    def _factors(self, f: Tensor, g: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[N, D + 2] and [M, D + 2] whose product is (f_i + g_j - C_ij) / eps."""
        (x, y), (half_x, half_y) = self.places, self.halves
        ones = [torch.ones_like(half).unsqueeze(1) for half in (half_x, half_y)]
        left = torch.cat([x / eps, ((f - half_x) / eps).unsqueeze(1), ones[0]], 1)
        right = torch.cat([y, ones[1], ((g - half_y) / eps).unsqueeze(1)], 1)
        return left.to(dtype), right.to(dtype)

    def _carried(self, points: Points, at: Tensor, pulls: bool) -> Tensor:
        """Of each point its weight, and with `pulls` its weight times its place."""
        weights = points.weights.unsqueeze(1)
        return torch.cat([weights, weights * at], 1) if pulls else weights

    def _exponentials(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        shape = len(left), len(right)
        exponents = torch.mm(left, right.T, out=self._buffer(shape, left.dtype))
        if exponents.dtype != dtype:
            exponents = self._buffer(shape, dtype).copy_(exponents)
        return exponents.clamp_(min=LEAST[dtype]).exp_()

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory that every tile uses again: fresh memory costs a page fault every 4 KB."""
        if dtype not in self.buffers:
            self.buffers[dtype] = torch.empty(TILE[0] * TILE[1], dtype=dtype)
        return self.buffers[dtype][: math.prod(shape)].view(shape)


def potentials(problem: Softmin, schedule: list[float], pulls: bool):
    """(f, g, pulls of x, pulls of y) at the last temperature: what `update` returns."""
    zeros = [points.weights.new_zeros(len(points.at), dtype=torch.float64) for points in (problem.x, problem.y)]
    f, g, *_ = problem.update(*zeros, schedule[0])
    for eps in schedule:
        new_f, new_g, *_ = problem.update(f, g, eps)
        f, g = 0.5 * (f + new_f), 0.5 * (g + new_g)
    return problem.update(f, g, schedule[-1], pulls)
