"""Arguments of total_correlation.c."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkl.native._pack import Plan, keep, known, plans, prepare

WHOLE = (0, 0)  # start and total of a block that is the whole batch


def _sums_plan(name: str, settings: tuple, rows: tuple, results: int, *more: Tensor) -> Plan | None:
    """The plan for `rows`, which are z, mu, logvar and of a block the rows' own mu and logvar, for `more` tensors and
    for the addresses of `results`."""
    key = ("total_correlation", name, settings, *known((*rows, *more)))
    try:
        return plans[key]
    except KeyError:
        pass
    z, mu, *_ = rows
    shape, tensors = (max(len(z), len(mu)), z.shape[1]), (*rows, *more)
    strides = [t.stride() if t.dim() == 2 else (*t.stride(), 0) for t in tensors]
    first, dataset_size, stratified, start, total = settings
    numbers = (len(z), len(mu), first, dataset_size, stratified, start, total)
    some = z.numel() and len(mu)
    return keep(
        key, prepare("total_correlation", name, numbers, shape, 1, tensors, strides, 1 + results) if some else None
    )


def total_correlation_fwd(z: Tensor, mu: Tensor, logvar: Tensor, first: int, dataset_size: int, stratified: bool):
    plan = _sums_plan("forward", (first, dataset_size, stratified, *WHOLE), (z, mu, logvar), 5)
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
    return _backward((first, dataset_size, stratified, *WHOLE), (z, mu, logvar), more, joint_sum, marginal_sum)


def total_correlation_block_fwd(z, own_mu, own_logvar, mu, logvar, first, dataset_size, stratified, start, total):
    rows = (z, mu, logvar, own_mu, own_logvar)
    plan = _sums_plan("forward", (first, dataset_size, stratified, start, total), rows, 2)
    if plan is None:
        return NotImplemented
    results = [z.new_empty(shape, dtype=plan.dtype) for shape in (z.shape[:1], z.shape)]
    plan.run(z.new_zeros((), dtype=torch.int64), *rows, *results)
    return results


def total_correlation_block_bwd(
    dmutual, dtotal, ddimension, z, own_mu, own_logvar, mu, logvar, joint_sum, marginal_sum, dz, dmu, dlogvar, first,
    dataset_size, stratified, start, total,
):  # fmt: skip
    more = (dmutual, dtotal, ddimension, dz, dmu, dlogvar)
    settings = (first, dataset_size, stratified, start, total)
    return _backward(settings, (z, mu, logvar, own_mu, own_logvar), more, joint_sum, marginal_sum)


def _backward(settings: tuple, rows: tuple, more: tuple, joint_sum: Tensor, marginal_sum: Tensor):
    plan = _sums_plan("backward", settings, rows, 2, *more)
    if plan is None:
        return NotImplemented
    far = rows[0].new_zeros((), dtype=torch.int64)
    plan.run(far, *rows, *more, joint_sum.contiguous(), marginal_sum.contiguous())
    return NotImplemented if far.item() else None
