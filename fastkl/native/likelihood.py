"""Arguments of likelihood.c: normal_log_prob and bernoulli_log_prob."""

from __future__ import annotations

import functools

from fastkl.native._pack import keep, known, plans, prepare

NORMAL, BERNOULLI = 0, 1
FULL, ROW, SHARED = 0, 1, 2  # log-variances: of each element, of each row, or one row of them for all


def _plan(name: str, density: int, event_ndim: int, tensors: tuple):
    """The plan for first, second and logvar, then value or dvalue, dfirst, dsecond and dlogvar. None for a missing one,
    or for the value, which the call allocates later, contiguously."""
    key = ("likelihood", name, density, event_ndim, *known(tensors))
    try:
        return plans[key]
    except KeyError:
        pass
    like, logvar = tensors[0], tensors[2]
    rows = like.shape[: like.dim() - event_ndim]
    value = tensors[3] if name == "backward" else like.new_empty(rows)
    strides = [_strides(tensor, like, event_ndim) for tensor in tensors]
    strides[3] = (*value.stride(), *[0] * event_ndim)
    spread = FULL
    if logvar is not None and logvar.shape != like.shape:
        spread = SHARED if logvar.dim() < like.dim() else ROW
    plan = prepare("likelihood", name, (density, spread), like.shape, event_ndim, tensors, strides, result=rows)
    return keep(key, plan)


def _strides(tensor, like, event_ndim: int) -> tuple[int, ...]:
    """Strides in like's dimensions of a tensor of its shape, or with one value per row or per column."""
    if tensor is None:
        return (0,) * like.dim()
    missing, own = like.dim() - tensor.dim(), tensor.stride()
    if missing or tensor.shape == like.shape:
        return (*[0] * missing, *own)
    return (*own[: like.dim() - event_ndim], *[0] * event_ndim)


def _forward(density: int, first, second, logvar, event_ndim: int):
    tensors = (first, second, logvar)
    plan = _plan("forward", density, event_ndim, (*tensors, None))
    if plan is None:
        return NotImplemented
    value = first.new_empty(plan.result, dtype=plan.dtype)
    if 0 in first.shape:
        return value.zero_()
    plan.run(*tensors, value)
    return value


def _backward(density: int, inputs: tuple, dlog_prob, outputs: tuple, event_ndim: int):
    """Write the outputs and return None, or return NotImplemented."""
    tensors = (*inputs, dlog_prob, *outputs)
    plan = _plan("backward", density, event_ndim, tensors)
    if plan is None:
        return NotImplemented
    if inputs[0].numel():
        plan.run(*tensors)
    else:
        for output in outputs:
            if output is not None:
                output.zero_()
    return None


normal_log_prob_fwd = functools.partial(_forward, NORMAL)


def normal_log_prob_bwd(dlog_prob, x, mean, logvar, dx, dmean, dlogvar, event_ndim):
    return _backward(NORMAL, (x, mean, logvar), dlog_prob, (dx, dmean, dlogvar), event_ndim)


def bernoulli_log_prob_fwd(logits, x, event_ndim):
    return _forward(BERNOULLI, logits, x, None, event_ndim)


def bernoulli_log_prob_bwd(dlog_prob, logits, x, dlogits, dx, event_ndim):
    return _backward(BERNOULLI, (logits, x, None), dlog_prob, (dlogits, dx, None), event_ndim)
