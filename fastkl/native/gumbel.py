"""Arguments of gumbel.c: gumbel_softmax."""

from __future__ import annotations

import torch

from fastkl.native._pack import keep, known, plans, prepare


def _plan(name: str, hard: bool, dim: int, stream: int, *tensors):
    """The plan for tensors of one shape; a missing one is None."""
    key = ("gumbel_softmax", name, hard, dim, stream, known(tensors))
    try:
        return plans[key]
    except KeyError:
        like = next(tensor for tensor in tensors if tensor is not None)
        strides = [(0,) * like.dim() if tensor is None else tensor.stride() for tensor in tensors]
        others = 2 if name == "backward" else 1  # the seed, and the output for tau's gradient
        numbers = (hard, stream)
        return keep(key, prepare("gumbel", name, numbers, like.shape, like.dim() - dim, tensors, strides, others))


def gumbel_softmax_fwd(logits, tau, seed, constant, hard, dim, stream):
    y = torch.empty_like(logits)
    plan = _plan("forward", hard, dim, stream, logits, y)
    if plan is None:
        return NotImplemented
    if y.numel():
        plan.run_at(constant if tau is None else tau.item(), 0.0, seed, logits, y)
    return y


def gumbel_softmax_bwd(dy, y, logits, tau, seed, constant, hard, dim, stream, tau_gradient):
    like = y if logits is None else logits
    gradient = torch.empty_like(like)
    y = y if logits is None else None
    plan = _plan("backward", hard, dim, stream, logits, y, dy, gradient)
    if plan is None:
        return NotImplemented
    gradients = [gradient]
    if tau_gradient:
        gradients.append(like.new_empty((), dtype=plan.dtype))
    if like.numel() == 0:
        gradients = [each.zero_() for each in gradients]
    else:
        dtau = gradients[1] if tau_gradient else None
        plan.run_at(constant if tau is None else tau.item(), 0.0, seed, logits, y, dy, gradient, dtau)
    if tau_gradient and tau.dtype is not plan.dtype:
        gradients[1] = gradients[1].to(tau.dtype)
    return gradients
