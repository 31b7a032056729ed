"""Sums of a kernel over pairs of points, and their gradient, in torch ops: a sweep over square blocks of pairs.

With t = |z_i - z_j|^2 / (2 D) the kernel is f(t) (reference.mmd_kernel), and for weights c_ij

    sum_ij c_ij f(t_ij),    its gradient in z_i   (2 / D) sum_j c_ij f'(t_ij) (z_i - z_j)

are computed together, each pair once: block (a, b) also counts for (b, a). t comes from a matrix product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops._register import without_autocast

BLOCK = 512  # points per block side: a block of pairs and its temporaries stay in the CPU cache
SUMMED = 128  # terms summed by one matrix product
# The largest |z|^2 / (2 D s), z centred, s the smallest scale, for which the expansion |z_i|^2 + |z_j|^2 - 2 z_i . z_j
# is as accurate as differences: in the compute dtype, and in float64.
LIMITS = {torch.float32: (32.0, 1e8), torch.float64: (1e3, 1e3)}
# Powers of 2 below these are subnormal, and slow.
SMALLEST_POWER = {torch.float32: -125.0, torch.float64: -1020.0}


class Points:
    """[x, y] centred, and the precision that their squared distances need."""

    def __init__(self, x: Tensor, y: Tensor, kernel: str, scales: list[float]):
        self.dtype = reference.compute_dtype(x, y)
        z = torch.cat([x, y]).double()
        z -= z.mean(0)
        self.size = z.shape[1]
        norms = z.square().sum(1, keepdim=True) / (2 * self.size)
        ratio = norms.amax() / min(scales)
        near, far = LIMITS[self.dtype]
        self.expanded = not ratio > far  # NaN may be expanded: it stays NaN
        self.product_dtype = self.dtype if not ratio > near else torch.float64
        ones = torch.ones_like(norms)
        # left @ right.T is t. The slopes are multiplied by the first columns of `right`, without the norms.
        self.left = torch.cat([z / -self.size, norms, ones], 1).to(self.product_dtype)
        self.right = torch.cat([z, ones, norms], 1).to(self.product_dtype)
        # Minus the slope at the mean of t. Adding it to all slopes keeps the sums of products small and accurate;
        # `gradient` corrects for it.
        self.common = -reference.mmd_kernel_slope(2 * norms.mean(), kernel, scales).to(self.dtype)

    def start(self, rows: int) -> None:
        """Allocate memory for blocks of up to rows^2 pairs, which all blocks share."""
        self.product = self.left.new_empty(rows * rows)
        self.t = self.product if self.product_dtype == self.dtype else self.product.to(self.dtype)
        self.term, self.slope = torch.empty_like(self.t), torch.empty_like(self.t)
        self.part = self.right.new_empty(rows, self.size + 1)
        self.sums = self.right.new_zeros(len(self.right), self.size + 1)

    def distances(self, a: slice, b: slice) -> Tensor:
        """t of a block; infinity for a point with itself, where kernel and slope are 0."""
        product, t = of_block(self.product, a, b), of_block(self.t, a, b)
        if self.expanded:
            torch.mm(self.left[a], self.right[b].T, out=product)
        else:
            z = self.right[:, : self.size]
            distances = torch.cdist(z[a], z[b], compute_mode="donot_use_mm_for_euclid_dist")
            torch.mul(distances, distances, out=product).div_(2 * self.size)
        if product.dtype != t.dtype:
            t.copy_(product)
        return t.fill_diagonal_(math.inf) if a == b else t

    def add(self, weight: float, slope: Tensor, a: slice, b: slice) -> None:
        """Add weight sum_j slope_ij [z_j, 1] to the sums of the rows i of a."""
        part = self.part[: a.stop - a.start]
        # A product adds its terms one after the other: limit their number.
        for some, right in zip(slope.split(SUMMED, 1), self.right[b, : self.size + 1].split(SUMMED)):
            torch.mm(some.to(self.product_dtype), right, out=part)
            self.sums[a].add_(part, alpha=weight)

    def gradient(self, rows: slice, own: float, others: slice, mixed: float) -> Tensor:
        """(2 / D) sum_j c_ij slope_ij (z_i - z_j), corrected for the common slope."""
        sums, z = self.sums[rows], self.right[:, : self.size]
        total = own * z[rows].sum(0, dtype=torch.float64) + mixed * z[others].sum(0, dtype=torch.float64)
        count = own * (rows.stop - rows.start) + mixed * (others.stop - others.start)
        factor = (sums[:, -1:] - count * self.common).to(z.dtype)
        out = (total * self.common).to(z.dtype).sub(sums[:, :-1])
        return out.addcmul_(factor, z[rows]).mul_(2 / self.size).to(self.dtype)


def of_block(buffer: Tensor, a: slice, b: slice) -> Tensor:
    """The beginning of a buffer as a block of pairs."""
    rows, columns = a.stop - a.start, b.stop - b.start
    return buffer[: rows * columns].view(rows, columns)


def _sum(term: Tensor) -> Tensor:
    return term.sum(1).sum(dtype=torch.float64)


def imq_block(t: Tensor, term: Tensor, slope: Tensor | None, common: Tensor, scales: list[float]) -> Tensor:
    """The sum of sum_s s / (s + t); the derivative plus `common` goes to `slope`."""
    total, before = torch.zeros((), dtype=torch.float64, device=t.device), common
    for s in scales:
        torch.add(t, s, out=term).reciprocal_()
        total += s * _sum(term)
        if slope is not None:
            before = torch.addcmul(before, term, term, value=-s, out=slope)
    return total


def rbf_block(t: Tensor, term: Tensor, slope: Tensor | None, common: Tensor, scales: list[float]) -> Tensor:
    """Like imq_block, for sum_s exp(-t / s). Halving a scale squares its term, which saves most of the exponentials."""
    total, before = torch.zeros((), dtype=torch.float64, device=t.device), common
    last, smallest = 0.0, SMALLEST_POWER[t.dtype]
    for s in sorted(scales, reverse=True):
        if last == 2 * s:
            term.square_().clamp_min_(2.0**smallest)
        else:
            torch.mul(t, -math.log2(math.e) / s, out=term).clamp_min_(smallest).exp2_()
        total += _sum(term)
        if slope is not None:
            before = torch.add(before, term, alpha=-1 / s, out=slope)
        last = s
    return total


BLOCKS = {"imq": imq_block, "rbf": rbf_block}


def pair_weights(n: int, m: int, unbiased: bool) -> tuple[float, float, float]:
    """The weights c of a pair within x, within y, and between x and y, which counts in both orders. If m = 0, only
    pairs of x have a weight."""
    own = [1 / max(1, count * (count - 1) if unbiased else count * count) for count in (n, m)]
    return own[0], own[1] * bool(m), -1 / max(1, n * m) * bool(m)


@without_autocast
@torch.no_grad()
def between(x: Tensor, y: Tensor, kernel: str, scales: list[float], dx: bool) -> list[Tensor]:
    """[sum_ij k(x_i, y_j) in float64, its gradient in x if dx] of x [N, D] and y [M, D]."""
    n, m = x.shape[0], y.shape[0]
    points = Points(x, y, kernel, scales)
    rows, others = blocks(n, BLOCK), blocks(m, BLOCK, first=n)
    points.start(max(part.stop - part.start for part in (*rows, *others)))
    total = points.left.new_zeros((), dtype=torch.float64)
    for a in rows:
        for b in others:
            slope = of_block(points.slope, a, b) if dx else None
            total += BLOCKS[kernel](points.distances(a, b), of_block(points.term, a, b), slope, points.common, scales)
            if slope is not None:
                points.add(1.0, slope, a, b)
    return [total, points.gradient(slice(0, n), 0.0, slice(n, n + m), 1.0).mul_(0.5)] if dx else [total]


def fake_between(x: Tensor, y: Tensor, kernel: str, scales: list[float], dx: bool) -> list[Tensor]:
    return fake(x, y, dx, False)


@without_autocast
@torch.no_grad()  # an exported program calls this op directly, and it writes into buffers
def mmd(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, dx: bool, dy: bool) -> list[Tensor]:
    """[squared MMD in float64, its gradient in x if dx, in y if dy] of x [N, D] and y [M, D].

    If y has no rows, it is the mean over pairs of x."""
    n, m = x.shape[0], y.shape[0]
    points = Points(x, y, kernel, scales)
    weights = pair_weights(n, m, unbiased)
    x_blocks, y_blocks = blocks(n, BLOCK), blocks(m, BLOCK, first=n)
    every = [(a, 0, dx) for a in x_blocks] + [(b, 1, dy) for b in y_blocks]
    points.start(max((a.stop - a.start for a, _, _ in every), default=0))
    total = points.left.new_zeros((), dtype=torch.float64)
    if not unbiased:
        total += len(scales) * (n * weights[0] + m * weights[1])
    for index, (a, side_a, wanted_a) in enumerate(every):
        for b, side_b, wanted_b in every[index:]:
            weight = weights[side_a] if side_a == side_b else weights[2]
            t, term = points.distances(a, b), of_block(points.term, a, b)
            slope = of_block(points.slope, a, b) if wanted_a or wanted_b else None
            total += weight * (1 if a == b else 2) * BLOCKS[kernel](t, term, slope, points.common, scales)
            if slope is not None and wanted_a:
                points.add(weight, slope, a, b)
            if slope is not None and wanted_b and a != b:
                points.add(weight, slope.T, b, a)
    xs, ys = slice(0, n), slice(n, n + m)
    gradients = [points.gradient(xs, weights[0], ys, weights[2])] if dx else []
    gradients += [points.gradient(ys, weights[1], xs, weights[2])] if dy else []
    return [total, *gradients]


def blocks(count: int, most: int, first: int = 0) -> list[slice]:
    """Slices of at most `most`, about equally long, of the `count` from `first` on."""
    step = -(-count // max(1, -(-count // most)))
    return [slice(start, min(start + step, first + count)) for start in range(first, first + count, max(1, step))]


def fake(first: Tensor, second: Tensor, *rest: Any) -> list[Tensor]:
    """[value in float64, the wanted gradients] of an op of two tensors whose last arguments say which are wanted."""
    dtype = reference.compute_dtype(first, second)
    gradients = [z.new_empty(z.shape, dtype=dtype) for z, wanted in zip((first, second), rest[-2:]) if wanted]
    return [first.new_empty((), dtype=torch.float64), *gradients]


def mmd_gradients(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, *_: bool):
    """The gradients in x and y, in differentiable torch ops; allocates [N + M, N + M], in float64 for the expansion."""
    n, m = x.shape[0], y.shape[0]
    z = torch.cat([x.double(), y.double()])
    z = z - z.mean(0)
    size = z.shape[1]
    half_norms = z.square().sum(1) / (2 * size)
    t = half_norms.unsqueeze(1) + half_norms - z @ z.T / size
    own, other, mixed = pair_weights(n, m, unbiased)
    weights = t.new_full((n + m, n + m), mixed)
    weights[:n, :n] = own
    weights[n:, n:] = other
    weights = weights * reference.mmd_kernel_slope(t, kernel, scales)
    gradient = (weights.sum(1, keepdim=True) * z - weights @ z) * (2 / size)
    return gradient.split([n, m])
