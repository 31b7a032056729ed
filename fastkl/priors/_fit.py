"""Expectation maximisation for Gaussian mixtures and its initialisation, for `GaussianMixture.fit`.

A mixture is (logits [K], means [K, D], logvars or None, scale_tril or None), as the ops take it; rows are data [N, D].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.ops._sampling import running_sum
from fastkl.ops.mixture.gmm_moments import gmm_moments

BLOCK = 1 << 20  # numbers in one block of distances
LLOYD_ITERATIONS = 20


class FitRecord(NamedTuple):
    """The history of a fit."""

    log_likelihood: list[float]  # mean over the data, in nats, before each iteration's step
    converged: bool


def em_step(rows: Tensor, mixture: tuple, covariance: str, regularisation: float) -> tuple[float, tuple]:
    """(mean log-likelihood of the mixture, the mixture after one step)."""
    logits, means, logvars, scale_tril = mixture
    log_prob, counts, first, second = gmm_moments(rows, logits, means, logvars, scale_tril=scale_tril)
    present = scale_tril @ scale_tril.mT if covariance == "full" else logvars.exp()
    return log_prob.double().mean().item(), maximise(means, present, counts, first, second, covariance, regularisation)


def maximise(means, present, counts, first, second, covariance: str, regularisation: float) -> tuple:
    """The mixture of greatest likelihood given moments about the present means.

    A pseudo-count of 10 eps, as in scikit-learn, represents the present component: without data it does not change.
    """
    pseudo_count = 10 * torch.finfo(counts.dtype).eps
    total = counts + pseudo_count
    logits = total.log() - total.sum().log()
    shift = first / total.unsqueeze(-1)
    if covariance == "full":
        second = (second + pseudo_count * present) / total[:, None, None] - shift.unsqueeze(-1) * shift.unsqueeze(-2)
        second.diagonal(dim1=-2, dim2=-1).add_(regularisation)
        scale_tril, bad = torch.linalg.cholesky_ex(second)
        _check_positive(bad == 0)
        return logits, means + shift, None, scale_tril
    variances = (second + pseudo_count * present) / total.unsqueeze(-1) - shift.square()
    if covariance == "spherical":
        variances = variances.mean(-1, keepdim=True)
    elif covariance == "tied":
        variances = (total.unsqueeze(-1) * variances).sum(0, keepdim=True) / total.sum()
    variances = variances.clamp(min=0) + regularisation  # rounding may leave a negative variance
    _check_positive((variances > 0).all(-1))
    return logits, means + shift, variances.log(), None


def _check_positive(good: Tensor) -> None:
    if not good.all():
        component = (~good).nonzero()[0].item()
        raise ValueError(f"the covariance of component {component} is singular; a larger regularisation prevents it")


def hard_start(rows: Tensor, centres: Tensor, covariance: str, regularisation: float) -> tuple:
    """The mixture with one component per centre, fitted to the data nearest to it."""
    groups = _differences(rows, assign(rows, centres)[0], centres)
    counts, first = _sums(groups, rows.dtype)
    second = [_outer(group) if covariance == "full" else group.square().sum(0) for group in groups]
    # A centre without data gets the covariance of all data.
    spread = rows.var(0, correction=0) + regularisation
    present = torch.diag_embed(spread) if covariance == "full" else spread
    return maximise(centres, present, counts, first, torch.stack(second), covariance, regularisation)


def _outer(differences: Tensor) -> Tensor:
    return differences.mT @ differences


def _differences(rows: Tensor, nearest: Tensor, centres: Tensor) -> list[Tensor]:
    """For each centre the differences [n, D] of its data to it, in the data's order. Sums over them are deterministic;
    index_add, which uses atomics on a GPU, is not."""
    order = nearest.argsort(stable=True)
    counts = torch.bincount(nearest, minlength=len(centres)).tolist()
    return [group - centre for group, centre in zip(rows[order].split(counts), centres)]


def _sums(groups: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(counts [K], sums of differences to the centre [K, D])."""
    first = torch.stack([group.sum(0) for group in groups])
    return torch.tensor([len(group) for group in groups], dtype=dtype, device=first.device), first


def assign(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(index of the nearest centre [N], squared distance to it [N]), computed by blocks of rows."""
    nearest = [distances.min(1) for distances in _squared_distances(rows, centres)]
    return torch.cat([block.indices for block in nearest]), torch.cat([block.values for block in nearest])


def _squared_distances(rows: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """Squared distances [n, K] for blocks of the rows, by a matrix product. Its rounding error grows with the distance
    from the origin, so the centres' mean is subtracted."""
    offset = centres.mean(0)
    centres = centres - offset
    for block in rows.split(max(1, BLOCK // max(centres.shape))):
        block = block - offset
        squares = block.square().sum(1, keepdim=True) + centres.square().sum(1)
        yield torch.addmm(squares, block, centres.mT, alpha=-2).clamp_(min=0)


def seeds(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Centres by greedy k-means++: each is a datum, drawn in proportion to its squared distance from the earlier ones.
    Of a few draws the one with the least remaining sum of squares is kept."""
    trials = 2 + int(math.log(count))
    uniform = torch.rand(1, generator=generator, device=rows.device, dtype=torch.float64)
    chosen = (uniform * len(rows)).long()
    distances = assign(rows, rows[chosen])[1]
    while len(chosen) < count:
        cumulative = running_sum(distances.double())
        uniform = torch.rand(trials, generator=generator, device=rows.device, dtype=torch.float64)
        # If all distances are 0, the data have fewer distinct values than centres; the clamp then picks some datum.
        drawn = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(rows) - 1)
        left = torch.minimum(torch.cat(list(_squared_distances(rows, rows[drawn]))), distances.unsqueeze(1))
        best = left.sum(0, dtype=torch.float64).argmin()
        distances, chosen = left[:, best], torch.cat([chosen, drawn[best].unsqueeze(0)])
    return rows[chosen]


def kmeans(rows: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Centres [K, D] by k-means++ and a few Lloyd iterations; a centre without data does not move."""
    centres = seeds(rows, count, generator)
    previous = None
    for _ in range(LLOYD_ITERATIONS):
        nearest = assign(rows, centres)[0]
        if previous is not None and torch.equal(nearest, previous):
            break
        counts, first = _sums(_differences(rows, nearest, centres), rows.dtype)
        centres, previous = centres + first / counts.clamp(min=1).unsqueeze(-1), nearest
    return centres
