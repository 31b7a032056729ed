"""The KLs of the groups of a hierarchical model, weighted against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops import _group
from fastkl.remedies._batch import batch_mean

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Beside the mean KL of a group, so that one whose KL is 0 still has a weight.
LEAST_KL = 0.01


def balance(
    kl: Tensor | Sequence[Tensor], sizes: Sequence[int] | None = None, *, beta: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """sum_g gamma_g KL_ng: the KLs of the groups of a hierarchical model, the larger ones pressed harder.

    gamma_g as of `balance_weights`, of this batch and without gradient: groups of little KL are encouraged to take
    more, so that none is given up early. While beta < 1 only, which is the warm-up: afterwards every gamma_g is 1.

    Args:
        kl: of each datum and group [*batch, G], or a sequence of G tensors [*batch], in nats.
        sizes: number of latent variables of each group; absent, all are alike.
        beta: the weight of the KL at this step, with which nothing is multiplied here; a number or a tensor with one
            value, which is compared without a synchronisation. Absent: balanced at every step.
        group: of processes; see `fastkl.remedies`.

    Returns:
        [*batch].

    Raises:
        TypeError, ValueError: as `balance_weights`.

    Source: Vahdat and Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder", arXiv:2007.03898, appendix A.

    >>> import torch
    >>> from fastkl import remedies
    >>> kl = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    >>> remedies.balance(kl, beta=1.0)
    tensor([4., 4.])
    >>> remedies.balance(kl, beta=0.5)  # weights near 1.5 and 0.5
    tensor([4.9950, 4.9950])
    """
    kl = _stacked(kl)
    weights = balance_weights(kl, sizes, group=group)
    if beta is not None:
        beta = arguments.check_weight("beta", beta)
        if not isinstance(beta, Tensor):
            beta = torch.full((), beta, dtype=torch.float32, device=kl.device)
        weights = torch.where(beta.detach() < 1, weights, 1.0)
    return (kl * weights).sum(-1)


@torch.no_grad()
def balance_weights(
    kl: Tensor | Sequence[Tensor], sizes: Sequence[int] | None = None, *, group: ProcessGroup | None = None
) -> Tensor:
    """gamma_g = G c_g / sum_h c_h with c_g = (mean_n |KL_ng| + 0.01) / size_g: their mean is 1. No gradient.

    The division by the size is that of the authors' code; the paper's text has it the wrong way round, as they say in
    github.com/NVlabs/NVAE/issues/26.

    Args:
        kl, sizes, group: as for `balance`.

    Returns:
        [G].

    Raises:
        TypeError: kl is neither a tensor of floating point nor a sequence of them; group is no process group.
        ValueError: tensors of different shapes; no groups; sizes that are not G numbers above 0.

    Source: as `balance`; the 0.01 is of the authors' code.

    >>> import torch
    >>> from fastkl import remedies
    >>> remedies.balance_weights(torch.tensor([[2.99, 0.99]]), sizes=[1, 1])
    tensor([1.5000, 0.5000])
    """
    kl = _stacked(kl).detach()  # tangents, too
    groups = kl.shape[-1]
    if not (sizes is None or isinstance(sizes, Iterable)) or (isinstance(sizes, Tensor) and sizes.dim() == 0):
        raise TypeError(f"sizes must be a sequence of numbers, got {sizes!r}")
    each = [1.0] * groups if sizes is None else [arguments.check_number("sizes", size, above=True) for size in sizes]
    if len(each) != groups:
        raise ValueError(f"sizes must be one for each of the {groups} groups of kl, got {len(each)}")
    if group is not None:
        _group.check_group(group)
    rows = kl.reshape(-1, groups).abs()
    weights = batch_mean(rows.sum(0), rows.shape[0], group) + LEAST_KL
    weights = weights / weights.new_tensor(each)
    return weights / weights.mean()


def _stacked(kl: Tensor | Sequence[Tensor]) -> Tensor:
    """[*batch, G] in float32 at least."""
    if not isinstance(kl, Tensor):
        if not isinstance(kl, (list, tuple)) or not kl:
            raise TypeError(f"kl must be a tensor [*batch, groups] or a sequence of tensors, got {kl!r}")
        arguments.check_tensors(**{f"kl[{index}]": each for index, each in enumerate(kl)})
        if any(each.shape != kl[0].shape for each in kl):
            raise ValueError(f"kl must hold tensors of one shape, got {', '.join(str(tuple(t.shape)) for t in kl)}")
        kl = torch.stack(kl, -1)
    arguments.check_tensors(kl=kl)
    if kl.dim() == 0 or kl.shape[-1] == 0:
        raise ValueError(f"kl must be [*batch, groups] with one group at least, got {tuple(kl.shape)}")
    return kl.to(torch.promote_types(kl.dtype, torch.float32))
