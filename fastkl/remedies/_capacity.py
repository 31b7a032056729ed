"""A capacity: the distance of the KL from a target."""

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
    """|KL - target|, which holds the KL at a number of nats, usually rising over the run (`schedules.linear`).

    Args:
        kl: the KL of each datum [*batch], in nats.
        target: the capacity C in nats, a number, 0 or more, or a tensor with one value.
        per: "sample", |KL_n - C| for each datum, as in the paper; "batch", |mean_n KL_n - C|, as in published code,
            which lets the KL differ between data.
        group: a process group, with per="batch"; see `fastkl.remedies`.

    Returns:
        [*batch], or one value [] with per="batch". It does not include the paper's weight gamma = 1000. The gradient at
        the target is 0.

    Raises:
        TypeError: kl is not a floating-point tensor; group is not a process group.
        ValueError: `per` is unknown; target is negative, or a tensor of more than one value; group is given without
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
