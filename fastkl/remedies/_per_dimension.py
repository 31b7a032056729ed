"""sum_d max(KL_nd, threshold) of every datum of a posterior, in bounded memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastkl import reference
from fastkl.distributions import DiagonalNormal
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply, needs_closed_form
from fastkl.ops.normal._closed_form import normal_gradients


def sum_of_parts(q: DiagonalNormal, prior: DiagonalNormal | None, threshold: float | Tensor, joint_ndim: int) -> Tensor:
    """[*batch]: the sum of max(KL of a part, threshold) over the parts of a datum, of `joint_ndim` dimensions each.

    On a GPU the fused KL op computes the terms of the small events, and they are saved for the backward pass. On a CPU
    that op gains little on small events, and a compiler fuses plain ops itself. There the terms exist for one block of
    rows at a time, and one byte per term records whether it is above the threshold.
    """
    batch_ndim = len(q.shape) - q.event_ndim
    if not plain(q.mean.device):
        terms = _parts(q, joint_ndim).kl(None if prior is None else _parts(prior, joint_ndim))
        return at_least(_flat(terms, batch_ndim), threshold)
    parameters = [arguments.expand(tensor, q.shape) for tensor in q.given]
    if prior is not None:
        parameters += [arguments.expand(tensor, q.shape) for tensor in prior.mean_and_logvar(*q.tensors)]
    bounds = arguments.check_bounds(q.bounds)
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float64, device=q.mean.device)
    settings = (threshold, joint_ndim, batch_ndim, q.kind, *bounds)
    return apply(_SumOfParts, *parameters, *[None] * (4 - len(parameters)), *settings)[0]


def plain(device: torch.device) -> bool:
    """Whether plain torch ops are faster than the fused one."""
    return device.type == "cpu" or torch.compiler.is_compiling()


def at_least(terms: Tensor, threshold: float | Tensor) -> Tensor:
    """sum max(terms, threshold) over the last dimension, by clamp: its gradient at equality is 1, maximum's is 1/2."""
    return terms.clamp(min=threshold).sum(-1)


def _parts(q: DiagonalNormal, joint_ndim: int) -> DiagonalNormal:
    """The same Gaussians with events of the last `joint_ndim` dimensions, plus one of size 1 in case it is 0."""
    tensors = tuple(tensor.unsqueeze(-1) for tensor in q.tensors)
    packed_dim = None if q.packed_dim is None else q.packed_dim - 1
    return replace(q, tensors=tensors, event_ndim=joint_ndim + 1, packed_dim=packed_dim)


def _flat(terms: Tensor, batch_ndim: int) -> Tensor:
    """The KLs of all parts of a datum [*batch, parts]."""
    return terms.unsqueeze(-1).flatten(batch_ndim)


def _terms(parameters, joint_ndim, scale, bounds) -> Tensor:
    """KL of every part."""
    elements = (None if tensor is None else tensor.unsqueeze(-1) for tensor in parameters)
    return reference.kl_normal(*elements, event_ndim=joint_ndim + 1, scale=scale, bounds=bounds)


class _SumOfParts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mu, parameter, prior_mu, prior_logvar, threshold, joint_ndim, batch_ndim, scale, low, high, live):
        """(the sums, a mask [*batch, *parts] of the terms with a gradient)."""
        results, bounds = [], arguments.as_bounds(low, high, live)
        for rows in arguments.row_blocks(mu):
            block = [arguments.rows_of(tensor, rows, mu) for tensor in (mu, parameter, prior_mu, prior_logvar)]
            terms = _terms(block, joint_ndim, scale, bounds)
            level = threshold.to(terms.dtype)
            results.append((at_least(_flat(terms, batch_ndim), level), terms >= level))
        sums, active = (torch.cat(blocks) if len(results) > 1 else blocks[0] for blocks in zip(*results))
        return sums, active

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.settings = inputs[5:]

    @staticmethod
    def backward(ctx, gradient, _):
        *parameters, active = ctx.saved_tensors
        joint_ndim, batch_ndim, scale, *bounds = ctx.settings
        bounds, mu = arguments.as_bounds(*bounds), parameters[0]
        tensors = [tensor for tensor in parameters if tensor is not None]
        gradient = gradient.reshape(*gradient.shape, *[1] * (mu.dim() - batch_ndim))
        active = active.reshape(*active.shape, *[1] * joint_ndim)

        def gradients_of(rows):
            block = [arguments.rows_of(tensor, rows, mu) for tensor in tensors]
            dkl = torch.where(arguments.rows_of(active, rows, mu), arguments.rows_of(gradient, rows, mu), 0.0)
            return normal_gradients(block, scale, bounds, dvalue=dkl)

        if needs_closed_form(gradient) or len(arguments.row_blocks(mu)) == 1:
            return *gradients_of(arguments.EVERYTHING), *[None] * (11 - len(tensors))
        gradients = [torch.empty_like(tensor) for tensor in tensors]
        for rows in arguments.row_blocks(mu):
            for out, block in zip(gradients, gradients_of(rows)):
                out[rows].copy_(block)
        return *gradients, *[None] * (11 - len(gradients))
