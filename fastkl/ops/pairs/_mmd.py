"""The squared MMD of two samples as a registered op with its gradient, which several public functions use."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._register import register
from fastkl.ops._sweep import Sweep
from fastkl.ops.pairs import _pairs


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


def mmd(x: Tensor, y: Tensor, kernel: str, scales: tuple[float, ...], unbiased: bool) -> Tensor:
    """The squared MMD of checked x [N, D] and y [M, D]. float64, because it is a difference of large sums to which
    callers may add more."""
    return MMD.value([kernel, list(scales), unbiased], x, y)


def check_scales(scales: Any) -> tuple[float, ...]:
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
