"""Closed form of total_correlation: sweeps over blocks of samples and posteriors whose temporaries stay in cache.

A block is [D, rows, columns] of (d, i, j): the joint is a sum over the first dimension, and the other sums run over
contiguous memory. With s = exp(-logvar / 2) / sqrt 2 and t = (z - mu) s a density is exp(ln s - t^2) / sqrt pi, so each
(i, j, d) takes only z - mu, t and one exponential. Exponents are relative to row i's own posterior, from which z_i is
drawn: its term is 1, and sums need no running maximum. If z_i lies so far from its own posterior that this overflows,
the densest posterior at each d is used instead.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl import reference

BLOCK = 65536  # elements: enough to hide the overhead of a block; five blocks take 1.3 MB
MOST_COLUMNS = 256
# exp of anything below is negligible, and could be a subnormal number, about 50 times slower.
NEGLIGIBLE = {torch.float32: -60.0, torch.float64: -300.0}
MOST_LOG_SCALE = {torch.float32: 88.0, torch.float64: 709.0}  # keeps s finite: infinity times 0 would be NaN


class Weights(NamedTuple):
    """w_ij in units of the most common weight: `own` for j = i, `following` for the next j."""

    log_base: float
    own: float
    following: float
    stratified: bool


def sample_weights(batch: int, dataset_size: int, stratified: bool) -> Weights:
    if not stratified:
        return Weights(-math.log(dataset_size * batch), 1.0, 1.0, False)
    others = batch - 1
    return Weights(-math.log(others), others / dataset_size, (dataset_size - others) / dataset_size, True)


def scales(logvar: Tensor) -> tuple[Tensor, Tensor]:
    """(s, ln s); ln s is exact even if s underflows or is clamped."""
    half = logvar * -0.5
    scale = half.clamp(max=MOST_LOG_SCALE[half.dtype]).exp_().mul_(math.sqrt(0.5))
    return scale, half.sub_(0.5 * math.log(2.0))


def finite_(t: Tensor) -> Tensor:
    """Clamp infinite distances. Their weight is 0, and 0 times infinity would be NaN."""
    most = torch.finfo(t.dtype).max
    return t.clamp_(-most, most)


def exp_(exponent: Tensor) -> Tensor:
    """exp in place, with 0 for negligible results."""
    return torch.nn.functional.threshold(exponent, NEGLIGIBLE[exponent.dtype], -math.inf, inplace=True).exp_()


class Sweep:
    """The tensors in the blocks' layout, and the sums over blocks.

    The posteriors are the whole batch, or its part from `start` on, out of `total`; then the rows have `own` mu and
    logvar. Row i's own posterior is first + i of the part, which may have no such posterior.
    """

    def __init__(
        self, z, mu, logvar, first: int, dataset_size: int, stratified: bool, own=None, start: int = 0, total: int = 0
    ):
        self.dtype = reference.compute_dtype(z, mu, logvar)
        z, mu, logvar = (tensor.to(self.dtype) for tensor in (z, mu, logvar))
        self.rows, self.batch = z.shape[0], mu.shape[0]
        self.first, self.start, self.total = first, start, total or self.batch
        self.weights = sample_weights(self.total, dataset_size, stratified)
        self.z, self.mu = z.t().contiguous(), mu.t().contiguous()
        self.scale, self.log_scale = scales(logvar.t().contiguous())
        if own is None:
            rows = slice(first, first + self.rows)
            own_mu, own_scale, self.own_log_scale = self.mu[:, rows], self.scale[:, rows], self.log_scale[:, rows]
        else:
            own_mu, own_logvar = (tensor.to(self.dtype).t() for tensor in own)
            own_scale, self.own_log_scale = scales(own_logvar.contiguous())
        self.own_squares = (self.z - own_mu).mul_(own_scale).square_()
        dims = max(1, self.z.shape[0])
        self.columns = min(self.batch, MOST_COLUMNS, max(16, BLOCK // dims))
        self.step = max(1, min(self.rows, BLOCK // (dims * self.columns)))
        self.buffers = [z.new_empty(dims * self.step * self.columns) for _ in range(5)]

    def row_blocks(self) -> list[slice]:
        return [slice(start, min(start + self.step, self.rows)) for start in range(0, self.rows, self.step)]

    def column_blocks(self) -> list[slice]:
        return [slice(start, min(start + self.columns, self.batch)) for start in range(0, self.batch, self.columns)]

    def buffer(self, index: int, rows: slice, columns: slice) -> Tensor:
        shape = (self.z.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        return self.buffers[index][: math.prod(shape)].view(shape)

    def scaled(self, rows: slice, columns: slice) -> Tensor:
        """t of a block."""
        out = self.buffer(0, rows, columns)
        torch.sub(self.z[:, rows, None], self.mu[:, None, columns], out=out)
        return out.mul_(self.scale[:, None, columns])

    def exponent(self, t: Tensor, columns: slice, origins: Tensor) -> Tensor:
        """ln s - t^2 + origin of a block. Origins [D, rows] are minus each row's reference exponents."""
        out = self.buffers[1][: t.numel()].view(t.shape)
        torch.add(origins.unsqueeze(2), self.log_scale[:, None, columns], out=out)
        return out.addcmul_(t, t, value=-1)

    def special(self, rows: slice, columns: slice) -> list[tuple[tuple[slice, slice], bool]]:
        """The parts of a block whose diagonals are rows' own posteriors (True) or the next ones (False)."""
        parts = []
        for is_own, shift in ((True, 0), (False, 1), (False, 1 - self.total)):
            offset = self.first + shift  # row i has posterior i + offset
            start = max(rows.start, columns.start - offset)
            stop = min(rows.stop, columns.stop - offset)
            if start < stop:
                of_rows = slice(start - rows.start, stop - rows.start)
                of_columns = slice(start + offset - columns.start, stop + offset - columns.start)
                parts.append(((of_rows, of_columns), is_own))
        return parts

    def sums(self, rows: slice, origins: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """(sum_j w exp(exponent) [D, rows], sum_j w exp(sum_d exponent - shift) [rows]), with weights in units of the
        base weight."""
        weights = self.weights
        marginal = self.z.new_zeros(self.z.shape[0], rows.stop - rows.start)
        joint = self.z.new_zeros(rows.stop - rows.start)
        for columns in self.column_blocks():
            exponent = self.exponent(self.scaled(rows, columns), columns, origins)
            total = exp_(exponent.sum(0).sub_(shift.unsqueeze(1)))
            exp_(exponent)
            if weights.stratified:
                for at, is_own in self.special(rows, columns):
                    weight = weights.own if is_own else weights.following
                    total[at].diagonal().mul_(weight)
                    exponent[:, at[0], at[1]].diagonal(0, 1, 2).mul_(weight)
            joint += total.sum(1)
            marginal += exponent.sum(2)
        return marginal, joint

    def references(self, far: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(origins [D, n], shift [n]) for `sums`: those of the row's own posterior. Rows `far` from it use those of the
        densest posterior, per dimension and jointly, so that no exponential overflows."""
        most = torch.finfo(self.dtype).max
        origins = self.own_squares.clamp(max=most) - self.own_log_scale
        shift = torch.zeros_like(origins[0])
        for rows in self.row_blocks():
            if far is None or not far[rows].any():
                continue
            densest, joint = [], []
            for columns in self.column_blocks():
                t = self.scaled(rows, columns)
                densest.append(self.exponent(t, columns, torch.zeros_like(origins[:, rows])).amax(2))
            origins[:, rows] = torch.where(far[rows], -torch.stack(densest).amax(0), origins[:, rows])
            for columns in self.column_blocks():
                joint.append(self.exponent(self.scaled(rows, columns), columns, origins[:, rows]).sum(0).amax(1))
            shift[rows] = torch.where(far[rows], torch.stack(joint).amax(0), shift[rows])
        return origins, shift


def sums(sweep: Sweep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(origins [D, n], shift [n], the marginals' sums [D, n], the joint's [n]), relative to rows' own posteriors."""
    origins, shift = sweep.references()
    marginal, joint = torch.empty_like(origins), torch.empty_like(shift)
    for rows in sweep.row_blocks():
        marginal[:, rows], joint[rows] = sweep.sums(rows, origins[:, rows], shift[rows])
    return origins, shift, marginal, joint


def forward(sweep: Sweep) -> list[Tensor]:
    """[mutual information, total correlation, dimension-wise KL [n], the joint's sums [n], the marginals' sums [n, D]].

    The sums are for `gradients`. A joint sum is negated to mark a row that is far from its own posterior.
    """
    origins, shift, marginal, joint = sums(sweep)
    most = torch.finfo(sweep.dtype).max
    far = ~((marginal > 0).all(0) & (marginal <= most).all(0) & (joint > 0) & (joint <= most))
    if far.any():
        origins, shift = sweep.references(far)
        for rows in sweep.row_blocks():
            if far[rows].any():
                marginal[:, rows], joint[rows] = sweep.sums(rows, origins[:, rows], shift[rows])
    off = sweep.own_squares - (origins + sweep.own_log_scale)  # rounding error, except for far rows
    three = parts(sweep.weights, sweep.z, origins, marginal.log(), joint.log().add_(shift), off)
    return [*three, torch.where(far, -joint, joint), marginal.t().contiguous()]


def parts(weights: Weights, z: Tensor, origins: Tensor, log_marginal: Tensor, log_joint: Tensor, off: Tensor):
    """The three estimates, from logarithms of sums relative to the same origins, so that no large terms cancel. `off`
    is the difference of these origins from the own posterior's. All but log_joint [n] are [D, n]."""
    joint, marginal = log_joint + weights.log_base, log_marginal + weights.log_base
    against_prior = (0.5 * z.square()).sub_(origins).add_(marginal).sum(0)
    dimension_wise = against_prior.add_(z.shape[0] * 0.5 * math.log(2.0))
    return [-joint - off.sum(0), joint - marginal.sum(0), dimension_wise]


def coefficients_of(dmutual: Tensor, dtotal: Tensor, ddimension: Tensor) -> list[Tensor]:
    """The loss's coefficients of ln q(z|x), ln q(z), each ln q(z_d), and -ln p(z)."""
    return [dmutual, dtotal - dmutual, ddimension - dtotal, ddimension]


def gradients(sweep: Sweep, coefficients: list[Tensor], joint_sum: Tensor, marginal_sum: Tensor):
    """(dz, dmu, dlogvar) [rows, D]; coefficients [n] belong to ln q(z|x), ln q(z), each ln q(z_d), and -ln p(z).

    The exponents are bit-identical to the forward pass's, so a single posterior has a share of exactly 1."""
    own, joint, marginal, prior = coefficients
    origins, shift = sweep.references(joint_sum < 0)
    # A row of weight 0 has gradient 0, even if it lies infinitely far from all posteriors.
    marginal = (marginal / marginal_sum.t()).masked_fill_(marginal == 0, 0.0).unsqueeze(2)
    joint = (joint / joint_sum.abs()).masked_fill_(joint == 0, 0.0).unsqueeze(1)
    weights = sweep.weights
    dz = torch.zeros_like(sweep.z)
    count, first, second = (torch.empty_like(sweep.mu) for _ in range(3))
    for columns in sweep.column_blocks():
        # Accumulate element by element, and sum over the rows of a block at the end: that is faster.
        blocks = sweep.row_blocks()
        totals = [sweep.buffer(i, blocks[0], columns).zero_() for i in (2, 3, 4)]
        for rows in blocks:
            t = finite_(sweep.scaled(rows, columns))
            weight = sweep.exponent(t, columns, origins[:, rows])
            of_joint = exp_(weight.sum(0).sub_(shift[rows].unsqueeze(1))).mul_(joint[rows])
            torch.addcmul(of_joint, exp_(weight), marginal[:, rows], out=weight)
            for at, is_own in sweep.special(rows, columns):
                diagonal = weight[:, at[0], at[1]].diagonal(0, 1, 2)
                diagonal.mul_(weights.own if is_own else weights.following)
                if is_own:
                    diagonal += own[rows][at[0]]
            here = [total[:, : rows.stop - rows.start] for total in totals]
            here[0].add_(weight)
            here[1].add_(weight.mul_(t))
            here[2].addcmul_(weight, t)
            dz[:, rows] += weight.mul_(sweep.scale[:, None, columns]).sum(2)
        for out, total in zip((count, first, second), totals):
            torch.sum(total, 1, out=out[:, columns])
    dz.mul_(-2.0)
    if 0 <= sweep.first < sweep.batch:  # the prior's part belongs to the block with the rows' own posteriors
        dz.addcmul_(sweep.z, prior)
    return dz.t(), first.mul_(sweep.scale).mul_(2.0).t(), second.sub_(count, alpha=0.5).t()
