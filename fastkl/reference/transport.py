"""Optimal transport between samples, by projections or by entropic regularisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype
from fastkl.reference.noise import Stream, normal_noise


def projections(seed: Tensor, num_projections: int, dimensions: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Directions [P, D], uniform on the unit sphere: normal noise divided by its length."""
    noise = normal_noise(seed, (num_projections, dimensions), stream=Stream.DIRECTIONS)
    return directions(noise.to(dtype))


def directions(noise: Tensor) -> Tensor:
    """Rows of noise divided by their lengths. float32 noise is exactly 0 once in 2^25 times; for D = 1 that has to be
    replaced."""
    noise = noise.masked_fill(noise == 0, 1e-6)
    return noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)


def quantile_segments(n: int, m: int, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """(length, index into x, index into y) of the segments on which both quantile functions, of n and of m equal
    masses, are constant. Lengths are integers in units of the mass 1 / (n m), so rounding cannot add or drop one."""
    steps = [torch.arange(1, a + 1, device=device) * b for a, b in ((n, m), (m, n))]
    ends = torch.cat(steps).sort().values
    lengths = ends.diff(prepend=ends.new_zeros(1))  # 0 if both functions step
    return lengths, (ends - 1) // m, (ends - 1) // n


def sliced_wasserstein(x, y, num_projections, p=2, seed=None) -> Tensor:
    """mean over unit vectors of the integral over t in [0, 1] of |F_x^-1(t) - F_y^-1(t)|^p."""
    dtype = compute_dtype(x, y)
    unit = projections(seed, num_projections, x.shape[1], dtype)
    quantiles = [(unit @ points.to(dtype).T).sort(-1).values for points in (x, y)]
    lengths, *indices = quantile_segments(x.shape[0], y.shape[0], x.device)
    difference = (quantiles[0][:, indices[0]] - quantiles[1][:, indices[1]]).abs()
    return (difference.pow(p) * (lengths.to(dtype) / (x.shape[0] * y.shape[0]))).sum(-1).mean()


def sinkhorn_schedule(diameter: float, blur: float, scaling: float, final_updates: int) -> list[float]:
    """Temperatures eps, from the squared diameter down to blur^2 by factors of scaling^2, then repeats of blur^2.

    A blur below 1e-15 diameters is raised to that, because eps is a divisor.
    """
    blur = max(blur, 1e-15 * diameter if diameter > 0 else 1e-15)
    steps, eps = [], diameter * diameter
    if eps > 0:
        count = max(0, math.ceil(round((math.log(blur) - math.log(diameter)) / math.log(scaling), 9)))
        steps = [eps, *(eps * scaling ** (2 * index) for index in range(count))]
    return [*steps, *[blur * blur] * (1 + final_updates)]


def sinkhorn_divergence(
    x, y, blur=0.05, *, weights_x=None, weights_y=None, scaling=0.5, debias=True, diameter=None, final_updates=0
) -> Tensor:
    """OT_eps(x, y) - (OT_eps(x, x) + OT_eps(y, y)) / 2 by Sinkhorn's algorithm on matrices of costs |x - y|^2 / 2.

    Both potentials of a problem are averaged with their updates at every temperature. The gradient follows from the
    envelope theorem: it is that of one more update of fixed potentials.
    """
    dtype = compute_dtype(x, y, weights_x, weights_y)
    points = [x.to(dtype), y.to(dtype)]
    weights = [
        p.new_full(p.shape[:1], 1 / p.shape[0]) if w is None else w.to(dtype)
        for p, w in zip(points, (weights_x, weights_y))
    ]
    if diameter is None:
        both = torch.cat(points).detach()
        diameter = torch.linalg.vector_norm(both.amax(0) - both.amin(0)).item()
    schedule = sinkhorn_schedule(diameter, blur, scaling, final_updates)
    cross = _potentials(points, weights, schedule)
    if debias:
        own = [_potentials([p, p], [w, w], schedule)[0] for p, w in zip(points, weights)]
        cross = [f - g for f, g in zip(cross, own)]
    return sum((w * f).sum() for w, f in zip(weights, cross))


def _potentials(points, weights, schedule: list[float]) -> list[Tensor]:
    """[f on x, g on y] for the cost |x - y|^2 / 2, differentiable in the positions of their own points."""
    x, y = points
    log_x, log_y = (w.detach().log() for w in weights)

    def softmin(eps, source, target, exponent) -> Tensor:
        difference = source.unsqueeze(1) - target.detach()
        return -eps * torch.logsumexp(exponent - difference.square().sum(-1) / (2 * eps), 1)

    with torch.no_grad():
        f, g = softmin(schedule[0], x, y, log_y), softmin(schedule[0], y, x, log_x)
        for eps in schedule:
            f_new, g_new = softmin(eps, x, y, log_y + g / eps), softmin(eps, y, x, log_x + f / eps)
            f, g = (f + f_new) / 2, (g + g_new) / 2
    return [softmin(eps, x, y, log_y + g / eps), softmin(eps, y, x, log_x + f / eps)]
