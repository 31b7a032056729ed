"""Sinkhorn's algorithm between two weighted sets of points for the cost |x - y|^2 / 2.

Potentials f [N] and g [M] are updated together, at decreasing temperatures eps:
f_i <- -eps ln sum_j b_j exp((g_j - C_ij) / eps), and g alike. On a CPU a loop in C does so for small sets (`by_loops`)
and `Products` for large ones; `Softmin` does so everywhere, and `Shared` for points that are spread over processes. The
last three store nothing of size N x M.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl.ops import _group
from fastkl.ops._call import has_own_memory
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob_bwd, gmm_log_prob_fwd

# Rows and columns of a tile of exponents: its float64 and float32 values together fit the cache.
TILE = (256, 1024)
# The largest |x|^2 / eps for which exponents are computed by float32 products, with an error of 2^-23 times that.
FLOAT32_LIMIT = 300.0
# Exponents are clamped to at least this, and sums are then correct if their logarithms are at most that.
LEAST = {torch.float32: -60.0, torch.float64: -600.0}
MOST = {torch.float32: 46.0, torch.float64: 460.0}


class Points(NamedTuple):
    """The positions of the points [N, D] and their weights [N]."""

    at: Tensor
    weights: Tensor


class Softmin:
    """Updates by the mixture log-density: -eps ln sum_j exp(h_j - |x - y_j|^2 / (2 eps)) with components at y."""

    def __init__(self, x: Points, y: Points):
        self.x, self.y = x, y

    def _one(self, source: Points, target: Points, potential: Tensor, eps: float, pulls: bool):
        """(the source's new potential, its pulls or None), from the target's old potential."""
        dimensions, shift = source.at.shape[1], potential.mean()
        logits = target.weights.log() + ((potential - shift) / eps).to(source.at.dtype)  # small, so float32 is enough
        logvars = logits.new_full((1, 1, 1), math.log(eps))
        mixture, settings = (source.at, None, logits[None], target.at[None], logvars, None), ("point", "exact")
        lp, wide = gmm_log_prob_fwd(*mixture, *settings, 1)
        new = -eps * (lp + 0.5 * dimensions * math.log(2 * math.pi * eps) + logits.logsumexp(0)) - shift
        if not pulls:
            return new, None
        gradient = torch.empty_like(source.at)
        gmm_log_prob_bwd(torch.ones_like(lp), wide, None, *mixture, gradient, *[None] * 5, *settings)
        return new, -eps * gradient

    def update(self, f: Tensor, g: Tensor, eps: float, pulls: bool = False):
        """(new f, new g, x_i - sum_j pi_ij y_j, the same for y); the last two only if `pulls`."""
        new_f, pull_x = self._one(self.x, self.y, g, eps, pulls)
        if self.x is self.y:
            return new_f, new_f, pull_x, pull_x
        new_g, pull_y = self._one(self.y, self.x, f, eps, pulls)
        return new_f, new_g, pull_x, pull_y


class Shared(Softmin):
    """Points of all processes of a group, gathered once. A process updates the potentials of its own points, and then
    gathers those of the others: a number for each point, where a ring would send its position at every update."""

    def __init__(self, x: Points, y: Points, group: Any, sizes: list[list[int]]):
        super().__init__(x, y)
        self.group, self.sizes = group, sizes
        rank = torch.distributed.get_rank(group)
        self.own = [slice(sum(each[:rank]), sum(each[: rank + 1])) for each in sizes]

    def _own(self, source: Points, own: slice, target: Points, potential: Tensor, eps: float, pulls: bool):
        """`_one` for this process's points of the source."""
        part = Points(*(each[own] for each in source))
        if part.at.shape[0] == 0:
            return part.at[:, 0], part.at  # the dtype of the other processes' potentials
        return self._one(part, target, potential, eps, pulls)

    def update(self, f: Tensor, g: Tensor, eps: float, pulls: bool = False):
        """As Softmin's, with pulls of the own points alone."""
        own_f, pull_x = self._own(self.x, self.own[0], self.y, g, eps, pulls)
        if self.x is self.y:
            new_f = _group.gathered(self.group, own_f, self.sizes[0])
            return new_f, new_f, pull_x, pull_x
        own_g, pull_y = self._own(self.y, self.own[1], self.x, f, eps, pulls)
        together = _group.gathered(self.group, torch.cat([own_f, own_g]), [sum(each) for each in zip(*self.sizes)])
        parts = together.split([size for each in zip(*self.sizes) for size in each])
        return torch.cat(parts[::2]), torch.cat(parts[1::2]), pull_x, pull_y


class Products(Softmin):
    """Both updates from one matrix exp((f_i + g_j - C_ij) / eps), tile by tile. Its exponents are one matrix product;
    its rows and columns sum to exp((f - new f) / eps) and exp((g - new g) / eps). If both sets are the same points,
    half of the tiles suffice.

    The sums may underflow or overflow if the potentials are far from their update, in float32 sooner than in float64;
    then `Softmin` does that update.
    """

    def __init__(self, x: Points, y: Points, centre: Tensor):
        super().__init__(x, y)
        self.dtype = x.at.dtype
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.weights = {
            dtype: [points.weights.unsqueeze(1).to(dtype) for points in (x, y)] for dtype in (self.dtype, torch.float64)
        }
        (self.left, self.half_x), (self.right, self.half_y) = (self._factor(points, centre) for points in (x, y))
        self.radius = torch.maximum(self.half_x.amax(), self.half_y.amax()).item()

    @staticmethod
    def _factor(points: Points, centre: Tensor) -> tuple[Tensor, Tensor]:
        """(float64 [N, D + 2]: positions and two columns of ones; half of the squared lengths [N])."""
        factor = torch.ones(len(points.at), len(centre) + 2, dtype=torch.float64, device=centre.device)
        places = factor[:, :-2].copy_(points.at).sub_(centre)
        return factor, 0.5 * places.square().sum(1)

    def update(self, f: Tensor, g: Tensor, eps: float, pulls: bool = False):
        # With [x, f - |x|^2 / 2, 1] on the left and [y, 1, g - |y|^2 / 2] on the right, the product is f + g - C.
        torch.sub(f, self.half_x, out=self.left[:, -2])
        torch.sub(g, self.half_y, out=self.right[:, -1])
        left, right = self.left / eps, self.right
        if not (self.dtype == torch.float64 or pulls or self.radius > FLOAT32_LIMIT * eps):
            left, right = left.float(), right.float()
        for dtype in dict.fromkeys((self.dtype, torch.float64)):
            rows, columns = self._sums(left, right, dtype, pulls)
            logs = [rows[:, 0].log()]
            if self.x is not self.y:
                logs.append(columns[:, 0].log())
            if all(log.abs().amax().item() < MOST[dtype] for log in logs):  # NaN fails this
                break
        else:
            return super().update(f, g, eps, pulls)
        pull_x, pull_y = (
            factor[:, :-2] - total[:, 1:] / total[:, :1] if pulls else None
            for factor, total in ((self.left, rows), (self.right, columns))
        )
        new_f = torch.sub(f, logs[0], alpha=eps)
        return new_f, new_f if len(logs) == 1 else torch.sub(g, logs[1], alpha=eps), pull_x, pull_y

    def _sums(self, left: Tensor, right: Tensor, dtype: torch.dtype, pulls: bool) -> tuple[Tensor, Tensor]:
        """Sums of the matrix's rows times each y's weight, and of its columns times each x's; with `pulls` also times
        the position."""
        same = self.x is self.y
        carry_x, carry_y = self.weights[dtype]
        if pulls:
            carry_x, carry_y = (
                torch.cat([weights, weights * factor[:, :-2].to(dtype)], 1)
                for weights, factor in ((carry_x, self.left), (carry_y, self.right))
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
                elif across.stop > down.stop:  # mirror the tile's part beyond the block of rows
                    beyond = max(0, down.stop - j)
                    columns[j + beyond : across.stop] += plan[:, beyond:].T @ carry_x[down]
        return rows, columns

    def _exponentials(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """A tile of the matrix, in shared memory."""
        shape = len(left), len(right)
        exponents = torch.mm(left, right.T, out=self._buffer(shape, left.dtype))
        if exponents.dtype != dtype:
            exponents = self._buffer(shape, dtype).copy_(exponents)
        return exponents.clamp_(min=LEAST[dtype]).exp_()

    def _buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Memory that all tiles share: fresh memory costs a page fault every 4 KB."""
        if dtype not in self.buffers:
            self.buffers[dtype] = torch.empty(TILE[0] * TILE[1], dtype=dtype, device=self.left.device)
        return self.buffers[dtype][: math.prod(shape)].view(shape)


def potentials(problem: Softmin, schedule: list[float], pulls: bool):
    """(f, g, pulls of x, pulls of y) at the last temperature, as `update` returns them."""
    f, g = (cloud.weights.new_zeros(cloud.at.shape[0], dtype=torch.float64) for cloud in (problem.x, problem.y))
    f, g, *_ = problem.update(f, g, schedule[0])
    for eps in schedule:
        new_f, new_g, *_ = problem.update(f, g, eps)
        f, g = 0.5 * (f + new_f), 0.5 * (g + new_g)
    return problem.update(f, g, schedule[-1], pulls)


def by_loops(x: Points, y: Points, schedule: list[float], pulls: bool):
    """`potentials` of small sets on a CPU, in C; or NotImplemented."""
    from fastkl.native import sinkhorn

    if not has_own_memory(*x, *y):
        return NotImplemented
    return sinkhorn.potentials(x.at, y.at, x.weights, y.weights, schedule, pulls)
