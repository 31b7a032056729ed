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


def gumbel_softmax_bwd(dy, y, logits, tau, seed, dlogits, dtau, constant, hard, dim, stream):
    y = y if logits is None else None
    plan = _plan("backward", hard, dim, stream, logits, y, dy, dlogits)
    if plan is None:
        return NotImplemented
    if dlogits.numel() == 0:
        if dtau is not None:
            dtau.zero_()
        return None
    of_tau = dtau  # the sum in the compute dtype
    if dtau is not None and dtau.dtype is not plan.dtype:
        of_tau = dtau.new_empty((), dtype=plan.dtype)
    plan.run_at(constant if tau is None else tau.item(), 0.0, seed, logits, y, dy, dlogits, of_tau)
    if of_tau is not dtau:
        dtau.copy_(of_tau)
    return None
