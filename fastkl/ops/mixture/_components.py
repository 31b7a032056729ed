"""A mixture whose components are divided among processes: its density, from the densities of the processes' parts.

Process r has the density p_r of its components and the logarithm w_r of their weights' sum, not normalised:

    ln p(z) = logsumexp_r [w_r + ln p_r(z)] - logsumexp_r w_r

One all-gather sends w_r and the N values of w_r + ln p_r, in float64: every process adds the same numbers in the same
order and finds the same bits. (All-reduces of a maximum and of a sum would be two collectives.) Backward, a process
computes the gradient of an ordinary mixture, with the incoming gradient times its share exp(w_r + ln p_r - ln p). Then
the caller sums the rows' gradients [N, D] over processes, which is all that is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops._call import needs_closed_form

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = Sequence["ProcessGroup"]
Parameters = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]  # logits, means, logvars, scale_tril


def density(
    own: Callable[..., Tensor], rows: dict[str, Tensor], mixture: Parameters, form: str, precision: str, groups: Groups
) -> Tensor:
    """The log-density [*batch]; own(rows, *mixture, form, precision) is that of this process's components alone, in
    float64."""
    part, weight = _part(own, rows, mixture, form, precision)
    both = torch.cat([part.flatten(), weight.flatten()])
    for group in groups:
        both = _LogSumExp.apply(both, group)
    total, normaliser = both.split([part.numel(), weight.numel()])
    lp = total.view(part.shape) - normaliser.view(weight.shape)
    return lp.to(reference.compute_dtype(*rows.values(), *mixture))


def responsibilities(
    own: Callable[..., Tensor], within: Callable[..., Tensor], z: Tensor, mixture: Parameters, precision: str,
    groups: Groups,
) -> Tensor:  # fmt: skip
    """ln p(k | z) of this process's components; within(z, *mixture, precision) is that among them alone."""
    part, _ = _part(own, {"z": z}, mixture, "point", precision)
    total = part
    for group in groups:
        total = _LogSumExp.apply(total, group)
    for group in groups:
        total = _Shared.apply(total, group)
    share = (part - total).unsqueeze(-1)
    count, mixture = mixture[1].shape[-2], at_least_one(mixture)
    log_r = within(z, _weighted(mixture[0])[0], *mixture[1:], precision)
    return (log_r + share).to(log_r.dtype)[..., :count]


def at_least_one(mixture: Parameters) -> Parameters:
    """The mixture, or for an empty one a component of weight 0: this process then also checks its arguments, takes part
    in collectives, and computes gradients."""
    logits, means, logvars, scale_tril = mixture
    if means.shape[-2] > 0:
        return mixture
    one = means.new_zeros(*means.shape[:-2], 1, means.shape[-1])
    logits = torch.cat([logits, logits.new_full((*logits.shape[:-1], 1), -torch.inf)], -1)
    if logvars is not None and logvars.dim() > 1 and logvars.shape[-2] == 0:
        logvars = torch.cat([logvars, logvars.new_zeros(*logvars.shape[:-2], 1, logvars.shape[-1])], -2)
    if scale_tril is not None:
        triangle = torch.diag_embed(scale_tril.new_ones(*scale_tril.shape[:-3], 1, scale_tril.shape[-1]))
        scale_tril = torch.cat([scale_tril, triangle], -3)
    return logits, torch.cat([means, one], -2), logvars, scale_tril


def once(tensor: Tensor, groups: Groups) -> Tensor:
    """A tensor that all processes have. Its gradient counts on one of them, because gradients are summed over them."""
    return tensor if all(torch.distributed.get_rank(group) == 0 for group in groups) else tensor.detach()


def _part(
    own: Callable[..., Tensor], rows: dict[str, Tensor], mixture: Parameters, form: str, precision: str
) -> tuple[Tensor, Tensor]:
    """(w + ln p [*batch], w) of this process's components, in float64."""
    logits, *others = at_least_one(mixture)
    logits, weight = _weighted(logits)
    return own(rows, logits, *others, form, precision) + weight, weight


def _weighted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, their log-sum-exp w in float64). If all are -infinity, so is w, and the logits become 0: the components
    then have a density, and no share."""
    none = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(none, 0.0)
    return logits, logits.double().logsumexp(-1).masked_fill(none.squeeze(-1), -torch.inf)


class _LogSumExp(torch.autograd.Function):
    """ln of the sum of exp(part) over processes, which all processes find. Its gradient is that of one result."""

    @staticmethod
    def forward(ctx, part: Tensor, group) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        total = torch.stack(parts).logsumexp(0)
        ctx.save_for_backward(part, total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if needs_closed_form(gradient):
            raise RuntimeError("a mixture whose components are sharded has no second derivative")
        part, total = ctx.saved_tensors
        return (gradient * torch.exp(part - total)).masked_fill_(gradient == 0, 0.0), None  # NaN in rows of density 0


class _Shared(torch.autograd.Function):
    """A result that all processes have and use in different ways: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None
