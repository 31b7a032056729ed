"""Arguments of likelihood.c: normal_log_prob and bernoulli_log_prob."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.native._pack import Plan, keep, plans, prepare

NORMAL, BERNOULLI = 0, 1
FULL, ROW, SHARED = 0, 1, 2


def _make(key: tuple, name: str, density: int, spread: int, event_ndim: int, like: Tensor, tensors) -> Plan | None:
    """The plan for tensors in the C function's order; each is (tensor, strides in like's dimensions) or None."""
    absent = (None, (0,) * like.dim())
    present, strides = zip(*(absent if each is None else each for each in tensors))
    rows = like.shape[: like.dim() - event_ndim]
    plan = prepare("likelihood", name, (density, spread), like.shape, event_ndim, present, strides, result=rows)
    return keep(key, plan)


def _rows(like: Tensor, event_ndim: int):
    """Like `_by_rows`, for the values that the call itself allocates, contiguously."""
    return None, like.new_empty((*like.shape[: like.dim() - event_ndim], *[1] * event_ndim)).stride()


def _whole(tensor: Tensor):
    return tensor, tensor.stride()


def _by_rows(tensor: Tensor, event_ndim: int):
    return tensor, (*tensor.stride(), *[0] * event_ndim)


def _addresses(gradients: list[Tensor], wanted: list[bool]) -> list[int]:
    given = iter(gradients)
    return [next(given).data_ptr() if want else 0 for want in wanted]


def _spread(logvar: Tensor, like: Tensor, event_ndim: int):
    """(how the log-variance is broadcast, the log-variance with its strides in like's dimensions)."""
    missing, strides = like.dim() - logvar.dim(), logvar.stride()
    if missing:
        return SHARED, (logvar, (*[0] * missing, *strides))
    if logvar.shape == like.shape:
        return FULL, (logvar, strides)
    return ROW, (logvar, (*strides[: like.dim() - event_ndim], *[0] * event_ndim))


def normal_log_prob_fwd(x, mean, logvar, event_ndim):
    types = (x.dtype, mean.dtype, logvar.dtype)
    key = ("normal_log_prob", event_ndim, *types, x.shape, logvar.shape, x.stride(), mean.stride(), logvar.stride())
    try:
        plan = plans[key]
    except KeyError:
        spread, third = _spread(logvar, x, event_ndim)
        tensors = (_whole(x), _whole(mean), third, _rows(x, event_ndim))
        plan = _make(key, "forward", NORMAL, spread, event_ndim, x, tensors)
    if plan is None:
        return NotImplemented
    value = x.new_empty(plan.result, dtype=plan.dtype)
    if 0 in x.shape:
        return value.zero_()
    plan.run(x.data_ptr(), mean.data_ptr(), logvar.data_ptr(), value.data_ptr())
    return value


def normal_log_prob_bwd(dlog_prob, x, mean, logvar, event_ndim, wanted):
    inputs = (x, mean, logvar)
    gradients = [torch.empty_like(tensor) for tensor, want in zip(inputs, wanted) if want]
    types = (x.dtype, mean.dtype, logvar.dtype, dlog_prob.dtype)
    strides = (x.stride(), mean.stride(), logvar.stride(), dlog_prob.stride())
    key = ("normal_log_prob backward", event_ndim, *types, x.shape, logvar.shape, *strides, *wanted)
    try:
        plan = plans[key]
    except KeyError:
        spread, third = _spread(logvar, x, event_ndim)
        outputs = iter(gradients)
        dx, dmean, dlogvar = (next(outputs) if want else None for want in wanted)
        first_two = (None if each is None else _whole(each) for each in (dx, dmean))
        last = None if dlogvar is None else _spread(dlogvar, x, event_ndim)[1]
        tensors = (_whole(x), _whole(mean), third, _by_rows(dlog_prob, event_ndim), *first_two, last)
        plan = _make(key, "backward", NORMAL, spread, event_ndim, x, tensors)
    if plan is None:
        return NotImplemented
    if x.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    plan.run(x.data_ptr(), mean.data_ptr(), logvar.data_ptr(), dlog_prob.data_ptr(), *_addresses(gradients, wanted))
    return gradients


def bernoulli_log_prob_fwd(logits, x, event_ndim):
    key = ("bernoulli_log_prob", event_ndim, logits.dtype, x.dtype, logits.shape, logits.stride(), x.stride())
    try:
        plan = plans[key]
    except KeyError:
        tensors = (_whole(logits), _whole(x), None, _rows(logits, event_ndim))
        plan = _make(key, "forward", BERNOULLI, FULL, event_ndim, logits, tensors)
    if plan is None:
        return NotImplemented
    value = logits.new_empty(plan.result, dtype=plan.dtype)
    if 0 in logits.shape:
        return value.zero_()
    plan.run(logits.data_ptr(), x.data_ptr(), 0, value.data_ptr())
    return value


def bernoulli_log_prob_bwd(dlog_prob, logits, x, event_ndim, wanted):
    gradients = [torch.empty_like(tensor) for tensor, want in zip((logits, x), wanted) if want]
    strides = (logits.stride(), x.stride(), dlog_prob.stride())
    key = (
        "bernoulli_log_prob backward",
        event_ndim,
        logits.dtype,
        x.dtype,
        dlog_prob.dtype,
        logits.shape,
        *strides,
        *wanted,
    )
    try:
        plan = plans[key]
    except KeyError:
        outputs = iter(gradients)
        targets = (_whole(next(outputs)) if want else None for want in wanted)
        tensors = (_whole(logits), _whole(x), None, _by_rows(dlog_prob, event_ndim), *targets, None)
        plan = _make(key, "backward", BERNOULLI, FULL, event_ndim, logits, tensors)
    if plan is None:
        return NotImplemented
    if logits.numel() == 0:
        return [gradient.zero_() for gradient in gradients]
    plan.run(logits.data_ptr(), x.data_ptr(), 0, dlog_prob.data_ptr(), *_addresses(gradients, wanted), 0)
    return gradients
