"""Closed form of total_correlation for a small batch: all pairs at once, [D, n, B], in as few torch calls as possible.

The formulas are those of `_pairwise_normal`, which is used instead if a sample lies far from its own posterior.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops.pairs import _pairwise_normal as pairwise

MOST = 262144  # elements: below this the overhead of calls dominates; temporaries take 6 MB


class Pairs:
    """Weights, and densities relative to each row's own posterior: `joint` [n, B], `marginal` [D, n, B]."""

    def __init__(self, z, mu, logvar, first: int, dataset_size: int, stratified: bool):
        dtype = reference.compute_dtype(z, mu, logvar)
        self.z, mu, logvar = (tensor.to(dtype).t().contiguous() for tensor in (z, mu, logvar))
        rows, batch, self.first, self.own = z.shape[0], mu.shape[1], first, slice(first, first + z.shape[0])
        self.scale, self.log_scale = pairwise.scales(logvar)
        self.wide_scale = self.scale.unsqueeze(1)
        self.t = torch.sub(self.z.unsqueeze(2), mu.unsqueeze(1)).mul_(self.wide_scale)
        self.own_squares = self.t.diagonal(first, 1, 2).square()
        apart = self.log_scale.unsqueeze(1) - self.log_scale[:, self.own].unsqueeze(2)
        exponent = apart.add_(self.own_squares.unsqueeze(2)).addcmul_(self.t, self.t, value=-1)
        pairwise.finite_(self.t)
        self.joint = pairwise.exp_(exponent.sum(0))
        self.marginal = pairwise.exp_(exponent)
        self.weights = pairwise.sample_weights(batch, dataset_size, stratified)
        if stratified:
            matrix = torch.ones_like(self.joint)
            matrix.diagonal(first).fill_(self.weights.own)
            matrix.diagonal(first + 1).fill_(self.weights.following)
            if self.own.stop == batch:
                matrix[rows - 1, 0] = self.weights.following
            self.joint.mul_(matrix)
            self.marginal.mul_(matrix)


def forward(pairs: Pairs) -> list[Tensor] | None:
    """Like `_pairwise_normal.forward`; None if a row is far from its own posterior."""
    marginal, joint = pairs.marginal.sum(2), pairs.joint.sum(1)
    origins = pairs.own_squares - pairs.log_scale[:, pairs.own]
    three = pairwise.parts(pairs.weights, pairs.z, origins, marginal.log(), joint.log(), torch.zeros_like(origins))
    return [*three, joint, marginal.t().contiguous()] if three[1].sum().isfinite() else None


def gradients(pairs: Pairs, coefficients: list[Tensor], joint_sum: Tensor, marginal_sum: Tensor):
    """Like `_pairwise_normal.gradients`, for rows that are not far from their own posterior."""
    own, joint, marginal, prior = coefficients
    of_joint = pairs.joint.mul_((joint / joint_sum).unsqueeze(1))
    weight = torch.addcmul(of_joint, pairs.marginal, (marginal / marginal_sum.t()).unsqueeze(2))
    weight.diagonal(pairs.first, 1, 2).add_(own)
    count = weight.sum(1)
    first = weight.mul_(pairs.t).sum(1).mul_(pairs.scale).mul_(2.0)
    second = torch.mul(weight, pairs.t, out=pairs.marginal).sum(1).sub_(count, alpha=0.5)
    dz = weight.mul_(pairs.wide_scale).sum(2).mul_(-2.0).addcmul_(pairs.z, prior)
    return dz.t(), first.t(), second.t()
