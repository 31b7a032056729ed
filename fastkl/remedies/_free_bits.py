"""Free bits: no penalty on the KL below a threshold."""

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
    """The KL with free bits: below a threshold it is constant and has no gradient.

    per="sample":     max(KL_n, threshold)                one value for each datum n
    per="dimension":  sum_d max(KL_nd, threshold)         one value for each datum n; d are the latent dimensions
    per="batch":      sum_d max(mean_n KL_nd, threshold)  one value for the batch

    Only the last, which is the paper's, lets a dimension be unused by one datum and used by another.

    Args:
        kl: the posterior q, whose KL to `prior` a fused op computes; or the KL itself, for another prior: [*batch] per
            sample, else [*batch, D], whose last dimension may also hold groups of dimensions (or layers).
        threshold: nats, a number, 0 or more, or a tensor with one value.
        per: the unit of the threshold, as above.
        prior: the prior of a posterior's KL; None is N(0, I).
        joint_ndim: number of last dimensions of a posterior's event that share one threshold, on the sum of their KLs.
            With events [C, H, W], 0 means each latent variable, 2 each feature map, as in the authors' code.
        group: a process group, with per="batch"; see `fastkl.remedies`.

    Returns:
        [*batch], or one value [] with per="batch"; the term of the loss is `.mean()` in all three cases. The gradient
        at the threshold is the KL's. The backward pass needs one saved value for each datum or dimension; with
        per="dimension" a byte for each maximum, and on a GPU, outside torch.compile, its value.

    Raises:
        TypeError: kl is neither a floating-point tensor nor a posterior; group is not a process group.
        ValueError: `per` is unknown; threshold is negative, or a tensor of more than one value; a posterior has no
            batch dimensions; `prior` or joint_ndim is given with a tensor kl; group is given without per="batch".

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
        raise ValueError('joint_ndim needs per="dimension" or per="batch"; per="sample" already sums over the event')
    if per == "sample":
        return kl.kl(prior).clamp(min=threshold)
    if per == "dimension":
        return sum_of_parts(kl, prior, threshold, joint_ndim)
    means = kl.kl_per_dim(prior)
    if group is not None:
        rows = math.prod(kl.shape[:batch_ndim])
        # Without rows the means are NaN, which must not spoil the other processes' sums.
        means = batch_mean(means * rows if rows else means.nan_to_num(nan=0.0), rows, group)
    if joint_ndim:
        means = means.flatten(-joint_ndim).sum(-1)
    return at_least(means.flatten(), threshold)


def _of_kl(kl, threshold, per, prior, joint_ndim, group) -> Tensor:
    """Free bits of a KL given as a tensor."""
    arguments.check_tensors(kl=kl)
    if prior is not None or joint_ndim != 0:
        raise ValueError("prior and joint_ndim need kl to be a posterior, got a tensor")
    kl = kl.to(torch.promote_types(kl.dtype, torch.float32))
    if per == "sample":
        return kl.clamp(min=threshold)
    if kl.dim() < 2:
        expected = "[*batch, dimensions]" if per == "dimension" else "[batch, dimensions]"
        raise ValueError(f'kl must be {expected} with per="{per}", got {tuple(kl.shape)}')
    if per == "batch":
        rows = kl.flatten(0, -2)
        kl = batch_mean(rows.sum(0), rows.shape[0], group)
    return at_least(kl, threshold)
