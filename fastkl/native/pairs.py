"""Arguments of pairs.c (mmd), mmd_normal.c and total_correlation.c."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from fastkl.native._pack import Plan, function, keep, known, plans, prepare

KERNELS = {"imq": 0, "rbf": 1}
MOST_SCALES = 16  # of mmd_normal.c
BETWEEN = 2  # instead of whether the estimate is unbiased: only the pairs of a point of x with one of y


def _plan(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: int) -> Plan | None:
    """The plan of the squared MMD, or with `unbiased` BETWEEN of the pairs of x and y alone."""
    key = ("mmd", kernel, tuple(scales), unbiased, *known((x, y)))
    try:
        return plans[key]
    except KeyError:
        pass
    # The plan has the sizes of the larger batch. C gets the number of rows of each batch separately.
    shape = (max(len(x), len(y)), x.shape[1])
    count = len(scales)
    bits = struct.unpack(f"{count}q", struct.pack(f"{count}d", *scales))
    settings = (KERNELS[kernel], unbiased, len(x), len(y), count, *bits)
    return keep(key, prepare("pairs", "mmd", settings, shape, 1, (x, y), (x.stride(), y.stride()), others=3))


def mmd(x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, dx: bool, dy: bool):
    plan = _plan(x, y, kernel, scales, unbiased)
    if plan is None:
        return NotImplemented
    value = x.new_empty((), dtype=torch.float64)
    gradients = [z.new_empty(z.shape, dtype=plan.dtype) if want else None for z, want in ((x, dx), (y, dy))]
    plan.run(x, y, *gradients, value)
    return [value, *(gradient for gradient in gradients if gradient is not None)]


def mmd_between(x: Tensor, y: Tensor, kernel: str, scales: list[float], dx: bool):
    plan = _plan(x, y, kernel, scales, BETWEEN)
    if plan is None:
        return NotImplemented
    value = x.new_empty((), dtype=torch.float64)
    gradient = x.new_empty(x.shape, dtype=plan.dtype) if dx else None
    plan.run(x, y, gradient, None, value)
    # It computes -2 times the mean.
    return [each.mul_(-0.5 * len(x) * len(y)) for each in (value, gradient) if each is not None]


def mmd_posteriors(mu: Tensor, logvar: Tensor, scales: list[float], unbiased: bool, dmu: bool, dlogvar: bool):
    """[the sum over pairs in float64, the wanted gradients], or NotImplemented."""
    dtype = torch.float64 if torch.float64 in (mu.dtype, logvar.dtype) else torch.float32
    found = function("mmd_normal", "mmd_normal", dtype)
    if found is None or len(scales) > MOST_SCALES or not mu.numel():
        return NotImplemented
    (rows, size), count = mu.shape, len(scales)
    mean, variance = mu.to(dtype).T.contiguous(), logvar.to(dtype).exp().T.contiguous()
    gradients = [torch.empty_like(mean) for _ in range(2)] if dmu or dlogvar else []
    sums, total = (mu.new_empty(shape, dtype=torch.float64) for shape in ((rows,), ()))
    outputs = [gradient.data_ptr() for gradient in gradients] or [0, 0]
    addresses = [mean.data_ptr(), variance.data_ptr(), *outputs, sums.data_ptr(), total.data_ptr()]
    numbers = struct.pack(f"4q{count}d", rows, size, unbiased, count, *(1 / (size * s) for s in scales))
    found(numbers, struct.pack("7q", torch.get_num_threads(), *addresses), 0.0, 0.0)
    if dlogvar:
        gradients[1] *= variance
    return [total, *(gradient.T.contiguous() for want, gradient in zip((dmu, dlogvar), gradients) if want)]


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
