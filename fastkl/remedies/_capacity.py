"""The KL held at a number of nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.remedies._batch import batch_mean, check_group, nats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def capacity(
    kl: Tensor, target: float | Tensor, *, per: str = "sample", group: ProcessGroup | None = None
) -> Tensor:  # fmt: skip
    """|KL - target|: the KL held at a number of nats, which usually rises over the run (`schedules.linear`).

    Args:
        kl: of each datum [*batch], in nats.
        target: nats, a number from 0 on or a tensor with one value: the capacity C.
        per: "sample", |KL_n - C| for each datum, as the paper writes it; "batch", |mean_n KL_n - C|, as published code
            computes it, which is smaller where data differ, and leaves them free to.
        group: of processes, with per="batch"; see `fastkl.remedies`.

    Returns:
        [*batch], or one value [] per="batch". Weighted by gamma in the paper, whose
        gamma = 1000 is in the user's hands. At the target itself the gradient is 0.

    Raises:
        TypeError: kl is no tensor of floating point; group is no process group.
        ValueError: an unknown `per`; a negative target, or a tensor of more than one value; a group without
            per="batch".

    Source: Burgess et al. 2018, "Understanding disentangling in beta-VAE", arXiv:1804.03599, equation 8.

    >>> import torch
    >>> from fastkl import remedies
    >>> kl = torch.tensor([1.0, 4.0])
    >>> remedies.capacity(kl, 2.0), remedies.capacity(kl, 2.0, per="batch")
    (tensor([1., 2.]), tensor(0.5000))
    """
    arguments.check_choice("per", per, ("sample", "batch"))
    target = nats("target", target)
    arguments.check_tensors(kl=kl)
    check_group(group, per)
    kl = kl.to(torch.promote_types(kl.dtype, torch.float32))
    if per == "batch":
        kl = batch_mean(kl.sum(), kl.numel(), group)
    return (kl - target).abs()
