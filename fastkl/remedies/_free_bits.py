"""A level below which the KL is not felt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl.distributions import DiagonalNormal
from fastkl.ops import _arguments as arguments
from fastkl.remedies._batch import batch_mean, check_group, nats
from fastkl.remedies._per_dimension import at_least, sum_of_parts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def free_bits(
    kl: Tensor | DiagonalNormal, threshold: float | Tensor, *, per: str = "sample", prior: DiagonalNormal | None = None,
    joint_ndim: int = 0, group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """The KL with a level below which it counts as that level: no gradient pushes it further down.

    per="sample":     max(KL_n, threshold)                one value for each datum n
    per="dimension":  sum_d max(KL_nd, threshold)         one value for each datum n; d are the latent dimensions
    per="batch":      sum_d max(mean_n KL_nd, threshold)  one value for the batch

    Only the last lets a dimension stay silent for one datum and speak for another; it is the one of the paper.

    Args:
        kl: the posterior q, whose KL to `prior` is then made by the fused op that fits, of every datum, of every
            element or of the batch; or the KL itself where another prior gives it: [*batch] per sample, else
            [*batch, D], whose last dimension may as well hold groups of dimensions (or layers).
        threshold: nats, a number from 0 on or a tensor with one value.
        per: what the threshold belongs to, as above.
        prior: what a posterior's KL is to; absent, N(0, I).
        joint_ndim: how many of the last dimensions of a posterior's event share a threshold, which belongs to their
            sum. With events [C, H, W], 0 means every single latent variable, 2 every feature map, as in the
            authors' code.
        group: of processes, with per="batch"; see `fastkl.remedies`.

    Returns:
        [*batch], or one value [] per="batch"; `.mean()` is the term of the loss in all three. At the threshold itself
        the gradient is the KL's. For the backward pass one value for each datum or dimension is kept; with
        per="dimension" a byte for each maximum, and on a GPU, outside torch.compile, its value.

    Raises:
        TypeError: kl is neither a tensor of floating point nor a posterior; group is no process group.
        ValueError: an unknown `per`; a negative threshold, or a tensor of more than one value; a posterior without
            batch dimensions; `prior` or joint_ndim beside a KL that is there already; a group without per="batch".

    Source: Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow", arXiv:1606.04934,
    equation 16 (per="batch").

    >>> import torch, fastkl
    >>> from fastkl import remedies
    >>> q = fastkl.DiagonalNormal(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2))
    >>> [remedies.free_bits(q, 0.5, per=per).tolist() for per in ("sample", "dimension", "batch")]
    [[2.0, 0.5], [2.5, 1.0], 1.5]
    """
    arguments.check_choice("per", per, ("sample", "dimension", "batch"))
    threshold = nats("threshold", threshold)
    check_group(group, per)
    if not isinstance(kl, DiagonalNormal):
        return _of_kl(kl, threshold, per, prior, joint_ndim, group)
    batch_ndim = len(kl.shape) - kl.event_ndim
    if batch_ndim == 0:
        raise ValueError(f"kl must be a posterior with batch dimensions, got {kl}")
    if arguments.check_int("joint_ndim", joint_ndim, 0) > kl.event_ndim:
        raise ValueError(f"joint_ndim must be at most {kl.event_ndim}, the dimensions of an event, got {joint_ndim}")
    if per == "sample" and joint_ndim:
        raise ValueError('joint_ndim is for per="dimension" and per="batch"; a whole datum is joint already')
    if per == "sample":
        return kl.kl(prior).clamp(min=threshold)
    if per == "dimension":
        return sum_of_parts(kl, prior, threshold, joint_ndim)
    means = kl.kl_per_dim(prior)
    if group is not None:
        rows = math.prod(kl.shape[:batch_ndim])
        # Without rows the means are NaN; the sums that the other processes' are added to are not.
        means = batch_mean(means * rows if rows else means.nan_to_num(nan=0.0), rows, group)
    if joint_ndim:
        means = means.flatten(-joint_ndim).sum(-1)
    return at_least(means.flatten(), threshold)


def _of_kl(kl, threshold, per, prior, joint_ndim, group) -> Tensor:
    """Of a KL that is there already."""
    arguments.check_tensors(kl=kl)
    if prior is not None or joint_ndim != 0:
        raise ValueError("prior and joint_ndim are for a posterior, but kl is given as a tensor")
    kl = kl.to(torch.promote_types(kl.dtype, torch.float32))
    if per == "sample":
        return kl.clamp(min=threshold)
    if kl.dim() < 2:
        wanted = "[*batch, dimensions]" if per == "dimension" else "[batch, dimensions]"
        raise ValueError(f'kl must be {wanted} with per="{per}", got {tuple(kl.shape)}')
    if per == "batch":
        rows = kl.flatten(0, -2)
        kl = batch_mean(rows.sum(0), rows.shape[0], group)
    return at_least(kl, threshold)
