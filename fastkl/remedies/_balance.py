"""Balancing of the KLs of a hierarchical model's groups."""

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

# Added to the mean KL of a group, so that a group with a KL of 0 has a weight.
LEAST_KL = 0.01


def balance(
    kl: Tensor | Sequence[Tensor], sizes: Sequence[int] | None = None, *, beta: float | Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """sum_g gamma_g KL_ng: the KLs of a hierarchical model's groups, with larger weights on larger ones.

    gamma_g are the `balance_weights` of this batch, without gradient. Groups with a small KL get a small weight, so
    none collapses early. The weights apply while beta < 1, during the warm-up; afterwards every gamma_g is 1.

    Args:
        kl: the KL of each datum and group [*batch, G], or a sequence of G tensors [*batch], in nats.
        sizes: number of latent variables of each group; None: equal sizes.
        beta: the weight of the KL at this step, a number or a tensor with one value, which is compared without a
            synchronisation. It is not multiplied into the result. None: balanced at every step.
        group: a process group; see `fastkl.remedies`.

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
    """gamma_g = G c_g / sum_h c_h with c_g = (mean_n |KL_ng| + 0.01) / size_g, of mean 1 and without gradient.

    The division by the size follows the authors' code; the paper's text inverts it, as they say in
    github.com/NVlabs/NVAE/issues/26.

    Args:
        kl, sizes, group: as for `balance`.

    Returns:
        [G].

    Raises:
        TypeError: kl is neither a floating-point tensor nor a sequence of them; group is not a process group.
        ValueError: tensors of kl have different shapes; G is 0; sizes are not G numbers above 0.

    Source: as `balance`; the 0.01 is from the authors' code.

    >>> import torch
    >>> from fastkl import remedies
    >>> remedies.balance_weights(torch.tensor([[2.99, 0.99]]), sizes=[1, 1])
    tensor([1.5000, 0.5000])
    """
    kl = _stacked(kl).detach()  # also removes forward-mode tangents
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
    """kl as one tensor [*batch, G], in float32 at least."""
    if not isinstance(kl, Tensor):
        if not isinstance(kl, (list, tuple)) or not kl:
            raise TypeError(f"kl must be a tensor [*batch, groups] or a sequence of tensors, got {kl!r}")
        arguments.check_tensors(**{f"kl[{index}]": each for index, each in enumerate(kl)})
        if any(each.shape != kl[0].shape for each in kl):
            raise ValueError(f"kl must hold tensors of one shape, got {', '.join(str(tuple(t.shape)) for t in kl)}")
        kl = torch.stack(kl, -1)
    arguments.check_tensors(kl=kl)
    if kl.dim() == 0 or kl.shape[-1] == 0:
        raise ValueError(f"kl must be [*batch, groups] with at least one group, got {tuple(kl.shape)}")
    return kl.to(torch.promote_types(kl.dtype, torch.float32))
