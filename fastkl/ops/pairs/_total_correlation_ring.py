"""total_correlation of a batch that is spread over processes: blocks of posteriors go around a ring.

A row's sums over posteriors are relative to its own posterior, which its process has, so the sums of blocks just add.
Backward the blocks go around again, each followed by the gradient of its posteriors, to which every process adds.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _group
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops._register import register, without_autocast
from fastkl.ops.pairs import _pairwise_normal as pairwise

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# z [n, D] with its own posteriors, and a block of posteriors [B, D], from `start` on of all processes' `total`. Row i's
# own posterior is first + i of the block, which need not have it.
INPUTS = "Tensor z, Tensor own_mu, Tensor own_logvar, Tensor mu, Tensor logvar"
SETTINGS = "SymInt first, SymInt dataset_size, bool stratified, SymInt start, SymInt total"


def _sweep(z, own_mu, own_logvar, mu, logvar, first, dataset_size, stratified, start, total) -> pairwise.Sweep:
    return pairwise.Sweep(z, mu, logvar, first, dataset_size, stratified, (own_mu, own_logvar), start, total)


@without_autocast
def _forward(*args) -> list[Tensor]:
    _, _, marginal, joint = pairwise.sums(_sweep(*args))
    return [joint, marginal.t().contiguous()]


def _fake_forward(z, own_mu, own_logvar, mu, logvar, *settings) -> list[Tensor]:
    dtype = reference.compute_dtype(z, own_mu, own_logvar, mu, logvar)
    return [z.new_empty(shape, dtype=dtype) for shape in (z.shape[:1], z.shape)]


@without_autocast
def _backward(
    dmutual, dtotal, ddimension, z, own_mu, own_logvar, mu, logvar, joint_sum, marginal_sum, dz, dmu, dlogvar, *settings
) -> None:  # fmt: skip
    coefficients = pairwise.coefficients_of(*(tensor.to(joint_sum.dtype) for tensor in (dmutual, dtotal, ddimension)))
    sweep = _sweep(z, own_mu, own_logvar, mu, logvar, *settings)
    found = pairwise.gradients(sweep, coefficients, joint_sum, marginal_sum)
    for output, gradient in zip((dz, dmu, dlogvar), found):
        output.copy_(gradient)


def _kernels():
    from fastkl.kernels.pairs import total_correlation

    return total_correlation


def _loops():
    from fastkl.native import total_correlation

    return total_correlation


block_fwd = register(
    f"total_correlation_block_fwd({INPUTS}, {SETTINGS}) -> Tensor[]",
    closed_form=_forward,
    fake=_fake_forward,
    kernel=lambda: _kernels().block_fwd,
    native=lambda: _loops().total_correlation_block_fwd,
)
block_bwd = register(
    f"total_correlation_block_bwd(Tensor dmutual, Tensor dtotal, Tensor ddimension, {INPUTS}, Tensor joint_sum, "
    f"Tensor marginal_sum, Tensor(a!) dz, Tensor(b!) dmu, Tensor(c!) dlogvar, {SETTINGS}) -> ()",
    closed_form=_backward,
    kernel=lambda: _kernels().block_bwd,
    native=lambda: _loops().total_correlation_block_bwd,
)


class Spread:
    """What a process knows of the whole batch: `sizes` are the numbers of rows by rank."""

    def __init__(self, group: ProcessGroup, sizes: list[int], dataset_size: int, stratified: bool):
        self.group, self.sizes, self.rank = group, sizes, torch.distributed.get_rank(group)
        self.starts, self.total = [0, *itertools.accumulate(sizes)], sum(sizes)
        self.first, self.dataset_size, self.stratified = self.starts[self.rank], dataset_size, stratified

    def settings(self, source: int) -> tuple[int, int, bool, int, int]:
        """Those of the ops for the posteriors of the process `source`."""
        start = self.starts[source]
        return self.first - start, self.dataset_size, self.stratified, start, self.total

    @torch.no_grad()
    def sums(self, z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over all posteriors, [n] and [n, D], relative to rows' own ones."""
        joint, marginal = z.new_zeros(len(z)), torch.zeros_like(z)
        for source, block in _group.ring(self.group, torch.cat([mu, logvar], 1), self.sizes):
            if len(z) and len(block):
                found = block_fwd(z, mu, logvar, *block.chunk(2, 1), *self.settings(source))
                joint.add_(found[0]), marginal.add_(found[1])
        return joint, marginal

    def gradients(self, z, mu, logvar, joint, marginal, given: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        dz, total = torch.zeros_like(z), mu.new_zeros(max(self.sizes), 2 * mu.shape[1])
        for source, block in _group.ring(self.group, torch.cat([mu, logvar], 1), self.sizes):
            if len(z) and len(block):
                part, of_block = torch.empty_like(z), torch.empty_like(block)
                tensors = (z, mu, logvar, *block.chunk(2, 1), joint, marginal, part, *of_block.chunk(2, 1))
                block_bwd(*given, *tensors, *self.settings(source))
                dz.add_(part), total[: len(block)].add_(of_block)
            total = _group.passed_on(self.group, total)
        return dz, *total[: len(mu)].chunk(2, 1)


class _Ring(torch.autograd.Function):
    """The estimates, from the sums of `Spread.sums`."""

    @staticmethod
    def forward(z, mu, logvar, joint, marginal, spread):
        scale, log_scale = pairwise.scales(logvar.t())
        squares = (z - mu).t().mul(scale).square()
        weights = pairwise.sample_weights(spread.total, spread.dataset_size, spread.stratified)
        origins = squares - log_scale
        off = squares - (origins + log_scale)  # rounding error
        return tuple(pairwise.parts(weights, z.t(), origins, marginal.t().log(), joint.log(), off))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5])
        ctx.spread = inputs[5]

    @staticmethod
    def backward(ctx, dmutual, dtotal, ddimension):
        *inputs, joint, marginal = ctx.saved_tensors
        given = [torch.zeros_like(joint) if d is None else d for d in (dmutual, dtotal, ddimension)]
        if needs_closed_form(*given):
            raise NotImplementedError("total_correlation with group= has no second derivative")
        return *ctx.spread.gradients(*inputs, joint, marginal, given), None, None, None


def over_ranks(spread: Spread, z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...] | None:
    """The three estimates of this process's rows; None in all processes if a row of one is far from its own posterior,
    where sums relative to it overflow."""
    _group.refuse_forward_mode()
    dtype = reference.compute_dtype(z, mu, logvar)
    z, mu, logvar = (tensor.to(dtype) for tensor in (z, mu, logvar))
    joint, marginal = spread.sums(*(tensor.detach() for tensor in (z, mu, logvar)))
    good = (joint > 0).all() & (joint < math.inf).all() & (marginal > 0).all() & (marginal < math.inf).all()
    near = good.to(torch.int32)
    torch.distributed.all_reduce(near, torch.distributed.ReduceOp.MIN, group=spread.group)
    return apply(_Ring, z, mu, logvar, joint, marginal, spread) if near.item() else None
