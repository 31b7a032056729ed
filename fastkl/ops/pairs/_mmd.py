"""The squared MMD of two samples as a registered op with its gradient, which several public functions use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _group
from fastkl.ops._register import register
from fastkl.ops._sweep import Sweep
from fastkl.ops.pairs import _pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _kernels():
    from fastkl.kernels.pairs import mmd

    return mmd


def _loops():
    from fastkl.native import pairs

    return pairs


mmd_sums = register(
    "mmd(Tensor x, Tensor y, str kernel, float[] scales, bool unbiased, bool dx, bool dy) -> Tensor[]",
    closed_form=_pairs.mmd,
    fake=_pairs.fake,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().mmd,
)
MMD = Sweep(mmd_sums, _pairs.mmd_gradients, name="mmd")
between = register(
    "mmd_between(Tensor x, Tensor y, str kernel, float[] scales, bool dx) -> Tensor[]",
    closed_form=_pairs.between,
    fake=_pairs.fake_between,
    kernel=lambda: _kernels().between,
    native=lambda: _loops().mmd_between,
)


@torch.no_grad()
def _own_rows(
    x: Tensor, y: Tensor, kernel: str, scales: list[float], unbiased: bool, group: Any, sizes: list[list[int]],
    *wanted: bool,
) -> list[Tensor]:  # fmt: skip
    """[this process's rows' part of the squared MMD, the gradients of the whole in them]: own pairs, and pairs with the
    rows of the other processes, each block of which comes around the ring."""
    weights = _pairs.pair_weights(sum(sizes[0]), sum(sizes[1]), unbiased)
    rows, own = (x, y), torch.distributed.get_rank(group)
    dtype = reference.compute_dtype(x, y)
    total = x.new_zeros((), dtype=torch.float64)
    gradients = [torch.zeros_like(z, dtype=dtype) for z in rows]
    both = [sum(each) for each in zip(*sizes)]
    for source, block in _group.ring(group, torch.cat([z.to(dtype) for z in rows]), both):
        others = block.split([sizes[0][source], sizes[1][source]])
        for a, z in enumerate(rows):
            for b, other in enumerate(others):
                weight = weights[a] if a == b else weights[2]
                if min(len(z), len(other)) == 0 or weight == 0:
                    continue
                if a == b and source == own:
                    pairs = len(z) * (len(z) - unbiased)
                    found = mmd_sums(z, z[:0], kernel, scales, unbiased, wanted[a], False) if pairs else []
                    factors = [weight * pairs] * 2
                else:
                    found = between(z, other, kernel, scales, wanted[a])
                    factors = [weight, 2 * weight]  # the gradient is that of the pair (j, i) too
                for sum_, each, factor in zip((total, gradients[a]), found, factors):
                    sum_.add_(each, alpha=factor)
    return [total, *(gradient for gradient, want in zip(gradients, wanted) if want)]


OWN_ROWS = Sweep(_own_rows, once="mmd and mmd_normal with group= have no second derivative")


def mmd(
    x: Tensor, y: Tensor, kernel: str, scales: tuple[float, ...], unbiased: bool, group: ProcessGroup | None = None,
    sizes: list[list[int]] | None = None,
) -> Tensor:  # fmt: skip
    """The squared MMD of checked x [N, D] and y [M, D]. float64, because it is a difference of large sums to which
    callers may add more. `sizes` are the rows of x and of y of each process of a group."""
    if sizes is not None and len(sizes[0]) > 1:
        return _group.total(group, OWN_ROWS.value([kernel, list(scales), unbiased, group, sizes], x, y))
    return MMD.value([kernel, list(scales), unbiased], x, y)


def check_scales(scales: Any) -> tuple[float, ...]:
    """The scales of a kernel, checked."""
    try:
        numbers = tuple(scales)
    except TypeError:
        raise TypeError(f"scales must be a sequence of numbers, got {type(scales).__name__}") from None
    if not numbers:
        raise ValueError("scales must hold at least one number")
    return tuple(arguments.check_number("scales", number, above=True) for number in numbers)


def check_estimator(estimator: str, **rows: int) -> bool:
    """Whether the estimator is unbiased. `rows` are counted over all processes of a group."""
    unbiased = arguments.check_choice("estimator", estimator, reference.MMD_ESTIMATORS) == "unbiased"
    for name, count in rows.items():
        if count < 1 + unbiased:
            least = "2 rows for an unbiased estimate" if unbiased else "1 row"
            raise ValueError(f"{name} must have at least {least}, got {count}")
    return unbiased


def check_points(name: str, points: Tensor) -> Tensor:
    """Check points and flatten each event: [N, D]."""
    if points.dim() < 2 or 0 in points.shape[1:]:
        raise ValueError(f"{name} must be [N, D] with at least one dimension D, got shape {tuple(points.shape)}")
    return points.flatten(1)
