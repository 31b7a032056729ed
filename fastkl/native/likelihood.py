"""Arguments of likelihood.c: normal_log_prob and bernoulli_log_prob."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.native._pack import MOST_DIMS, call, function

NORMAL, BERNOULLI = 0, 1
FULL, ROW, SHARED = 0, 1, 2


def _logvar(logvar: Tensor, shape, event_ndim: int) -> tuple[int, list[int]]:
    """(how it is spread, a stride for each dimension of the full shape)."""
    missing = len(shape) - logvar.dim()
    strides = logvar.stride()
    if missing:
        return SHARED, [*[0] * missing, *strides]
    if logvar.shape == shape:
        return FULL, strides
    return ROW, [*strides[: len(shape) - event_ndim], *[0] * event_ndim]


def _target(gradients: list[Tensor], like: Tensor) -> list[int]:
    """Numbers of a new gradient like the tensor."""
    gradient = torch.empty_like(like)
    gradients.append(gradient)
    return [gradient.data_ptr(), *gradient.stride()]


def normal_log_prob_fwd(x, mean, logvar, event_ndim):
    dtype, shape = x.dtype, x.shape
    ndim = len(shape)
    if mean.dtype is not dtype or logvar.dtype is not dtype or ndim > MOST_DIMS:
        return NotImplemented
    run = function("likelihood", "forward", dtype)
    if run is None:
        return NotImplemented
    value = x.new_empty(shape[: ndim - event_ndim])
    if 0 in shape:
        return value.zero_()
    spread, strides = _logvar(logvar, shape, event_ndim)
    numbers = [torch.get_num_threads(), NORMAL, spread, ndim, event_ndim, *shape, x.data_ptr(), *x.stride()]
    numbers += [mean.data_ptr(), *mean.stride(), logvar.data_ptr(), *strides]
    call(run, [*numbers, value.data_ptr(), *value.stride(), *[0] * event_ndim])
    return value


def normal_log_prob_bwd(dlog_prob, x, mean, logvar, event_ndim, wanted):
    dtype, shape = x.dtype, x.shape
    ndim = len(shape)
    if mean.dtype is not dtype or logvar.dtype is not dtype or dlog_prob.dtype is not dtype or ndim > MOST_DIMS:
        return NotImplemented
    run = function("likelihood", "backward", dtype)
    if run is None:
        return NotImplemented
    spread, strides = _logvar(logvar, shape, event_ndim)
    numbers = [torch.get_num_threads(), NORMAL, spread, ndim, event_ndim, *shape, x.data_ptr(), *x.stride()]
    numbers += [mean.data_ptr(), *mean.stride(), logvar.data_ptr(), *strides]
    numbers += [dlog_prob.data_ptr(), *dlog_prob.stride(), *[0] * event_ndim]
    gradients = []
    absent = [0] * (ndim + 1)
    numbers += _target(gradients, x) if wanted[0] else absent
    numbers += _target(gradients, mean) if wanted[1] else absent
    if wanted[2]:
        gradient = torch.empty_like(logvar)
        gradients.append(gradient)
        numbers += [gradient.data_ptr(), *_logvar(gradient, shape, event_ndim)[1]]
    else:
        numbers += absent
    if 0 in shape:
        return [gradient.zero_() for gradient in gradients]
    call(run, numbers)
    return gradients


def bernoulli_log_prob_fwd(logits, x, event_ndim):
    dtype, shape = logits.dtype, logits.shape
    ndim = len(shape)
    if x.dtype is not dtype or ndim > MOST_DIMS:
        return NotImplemented
    run = function("likelihood", "forward", dtype)
    if run is None:
        return NotImplemented
    value = logits.new_empty(shape[: ndim - event_ndim])
    if 0 in shape:
        return value.zero_()
    numbers = [torch.get_num_threads(), BERNOULLI, FULL, ndim, event_ndim, *shape, logits.data_ptr(), *logits.stride()]
    numbers += [x.data_ptr(), *x.stride(), *[0] * (ndim + 1), value.data_ptr(), *value.stride(), *[0] * event_ndim]
    call(run, numbers)
    return value


def bernoulli_log_prob_bwd(dlog_prob, logits, x, event_ndim, wanted):
    dtype, shape = logits.dtype, logits.shape
    ndim = len(shape)
    if x.dtype is not dtype or dlog_prob.dtype is not dtype or ndim > MOST_DIMS:
        return NotImplemented
    run = function("likelihood", "backward", dtype)
    if run is None:
        return NotImplemented
    absent = [0] * (ndim + 1)
    numbers = [torch.get_num_threads(), BERNOULLI, FULL, ndim, event_ndim, *shape, logits.data_ptr(), *logits.stride()]
    numbers += [x.data_ptr(), *x.stride(), *absent, dlog_prob.data_ptr(), *dlog_prob.stride(), *[0] * event_ndim]
    gradients = []
    numbers += _target(gradients, logits) if wanted[0] else absent
    numbers += _target(gradients, x) if wanted[1] else absent
    if 0 in shape:
        return [gradient.zero_() for gradient in gradients]
    call(run, [*numbers, *absent])
    return gradients
