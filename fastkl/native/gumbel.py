"""Arguments of gumbel.c: gumbel_softmax."""

from __future__ import annotations

import torch

from fastkl.native._pack import MOST_DIMS, call, function


def gumbel_softmax_fwd(logits, tau, seed, constant, hard, dim):
    shape = logits.shape
    ndim = len(shape)
    run = function("gumbel", "forward", logits.dtype)
    if run is None or ndim > MOST_DIMS:
        return NotImplemented
    y = torch.empty_like(logits)
    if 0 not in shape:
        numbers = [torch.get_num_threads(), hard, seed.data_ptr(), ndim, ndim - dim, *shape]
        numbers += [logits.data_ptr(), *logits.stride(), y.data_ptr(), *y.stride()]
        call(run, numbers, constant if tau is None else tau.item())
    return y


def gumbel_softmax_bwd(dy, y, logits, tau, seed, constant, hard, dim, tau_gradient):
    like = y if logits is None else logits
    shape = like.shape
    ndim = len(shape)
    run = function("gumbel", "backward", like.dtype)
    if run is None or ndim > MOST_DIMS or dy.dtype is not like.dtype:
        return NotImplemented
    gradient = torch.empty_like(like)
    gradients = [gradient]
    absent = [0] * (ndim + 1)
    numbers = [torch.get_num_threads(), hard, seed.data_ptr(), ndim, ndim - dim, *shape]
    numbers += absent if logits is None else [logits.data_ptr(), *logits.stride()]
    numbers += absent if logits is not None else [y.data_ptr(), *y.stride()]
    numbers += [dy.data_ptr(), *dy.stride(), gradient.data_ptr(), *gradient.stride()]
    if tau_gradient:
        dtau = like.new_empty(())
        gradients.append(dtau)
        numbers.append(dtau.data_ptr())
    else:
        numbers.append(0)
    if 0 in shape:
        gradients = [each.zero_() for each in gradients]
    else:
        call(run, numbers, constant if tau is None else tau.item())
    if tau_gradient and tau.dtype is not like.dtype:
        gradients[1] = gradients[1].to(tau.dtype)
    return gradients
