"""Arguments of total_correlation.c."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkl.native._pack import Plan, keep, known, plans, prepare


def _sums_plan(name: str, settings: tuple, z: Tensor, mu: Tensor, logvar: Tensor, *more: Tensor) -> Plan | None:
    """The plan for z, mu, logvar and, backward, the incoming gradients and the outputs."""
    key = ("total_correlation", name, settings, *known((z, mu, logvar, *more)))
    try:
        return plans[key]
    except KeyError:
        pass
    shape, tensors = (max(len(z), len(mu)), z.shape[1]), (z, mu, logvar, *more)
    strides = [t.stride() if t.dim() == 2 else (*t.stride(), 0) for t in tensors]
    numbers = (len(z), len(mu), *settings)
    others = 1 + (5 if name == "forward" else 2)
    plan = prepare("total_correlation", name, numbers, shape, 1, tensors, strides, others) if z.numel() else None
    return keep(key, plan)


def total_correlation_fwd(z: Tensor, mu: Tensor, logvar: Tensor, first: int, dataset_size: int, stratified: bool):
    plan = _sums_plan("forward", (first, dataset_size, stratified), z, mu, logvar)
    if plan is None:
        return NotImplemented
    results = [z.new_empty(shape, dtype=plan.dtype) for shape in (*[z.shape[:1]] * 4, z.shape)]
    far, batch = z.new_zeros((), dtype=torch.int64), len(mu)
    base = -math.log(batch - 1 if stratified else dataset_size * batch)
    plan.run_at(base, 0.0, far, z, mu, logvar, *results)
    return NotImplemented if far.item() else results


def total_correlation_bwd(
    dmutual, dtotal, ddimension, z, mu, logvar, joint_sum, marginal_sum, dz, dmu, dlogvar, first, dataset_size,
    stratified,
):  # fmt: skip
    more = (dmutual, dtotal, ddimension, dz, dmu, dlogvar)
    plan = _sums_plan("backward", (first, dataset_size, stratified), z, mu, logvar, *more)
    if plan is None:
        return NotImplemented
    far = z.new_zeros((), dtype=torch.int64)
    plan.run(far, z, mu, logvar, *more, joint_sum.contiguous(), marginal_sum.contiguous())
    return NotImplemented if far.item() else None
