"""The Sinkhorn divergence of two samples, by streamed log-sum-exps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _group
from fastkl.ops._register import without_autocast
from fastkl.ops._sharding import by_parts
from fastkl.ops._sweep import Sweep
from fastkl.ops.transport._sinkhorn import Points, Products, Shared, Softmin, by_loops, potentials

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@without_autocast
@torch.no_grad()
def solve(
    x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor, blur: float, scaling: float, debias: bool,
    diameter: float, final_updates: int, group: Any, sizes: Any, *wanted: bool,
) -> list[Tensor]:  # fmt: skip
    """[divergence, its gradients in those of x, y, weights_x and weights_y that are wanted], all from the last update.
    A gradient in weights is the potential. `sizes` has the numbers of points of x and of y of a group's processes; the
    divergence is then this process's part of it."""
    dtype = reference.compute_dtype(x, y, weights_x, weights_y)
    clouds = [Points(at.to(dtype), weights.to(dtype)) for at, weights in ((x, weights_x), (y, weights_y))]
    if sizes is not None:
        clouds = [Points(*(_group.gathered(group, t, each) for t in own)) for own, each in zip(clouds, sizes)]
    if diameter < 0:
        diameter = _diameter(*clouds).item()
        if diameter == float("inf"):
            raise ValueError("x and y must lie in a box of finite size, got one with an infinite diagonal")
    schedule = reference.sinkhorn_schedule(diameter, blur, scaling, final_updates)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    pulls = any(wanted[:2])

    def between(first: Points, second: Points, sides: list[int]) -> tuple:
        if sizes is not None:
            return potentials(Shared(first, second, group, [sizes[side] for side in sides]), schedule, pulls)
        if on_cpu and (found := by_loops(first, second, schedule, pulls)) is not NotImplemented:
            return found
        if on_cpu:
            centre = torch.cat([at.double() for at, _ in clouds]).mean(0)
            return potentials(Products(first, second, centre), schedule, pulls)
        return potentials(Softmin(first, second), schedule, pulls)

    *both, pull_x, pull_y = between(clouds[0], clouds[1], [0, 1])
    moved = [pull_x, pull_y]
    if debias:
        for index, cloud in enumerate(clouds):
            potential, _, pull, _ = between(cloud, cloud, [index, index])
            both[index] = both[index] - potential
            moved[index] = moved[index] - pull if pulls else None
    weights = [weights_x.to(dtype), weights_y.to(dtype)]
    if sizes is not None:
        rank = torch.distributed.get_rank(group)
        both = [f.split(each)[rank] for f, each in zip(both, sizes)]
    value = torch.stack([(own.double() * f.double()).sum() for own, f in zip(weights, both)]).sum()
    gradients: list[Any] = [own.unsqueeze(1) * pull if pulls else None for own, pull in zip(weights, moved)] + both
    return [value.to(dtype), *(gradient.to(dtype) for gradient, want in zip(gradients, wanted) if want)]


def _diameter(x: Points, y: Points) -> Tensor:
    """The diameter of the box around all points, an upper bound of that of the points."""
    highest = torch.maximum(x.at.amax(0), y.at.amax(0))
    return torch.linalg.vector_norm(highest - torch.minimum(x.at.amin(0), y.at.amin(0)))


SINKHORN = Sweep(
    solve,
    once="sinkhorn_divergence has no second derivative: its gradient holds for potentials that have converged, and how "
    "these move with the points and weights is not known",
)


def _weights(name: str, weights: Tensor | None, points: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The weights, checked; equal ones, of `count` points in all, if none are given."""
    if weights is None:
        return torch.full(points.shape[:1], 1 / count, dtype=dtype, device=points.device)
    if weights.shape != points.shape[:1]:
        raise ValueError(f"{name} must have a weight for each point, {tuple(points.shape[:1])}, got "
                         f"{tuple(weights.shape)}")  # fmt: skip
    return weights


def _check_masses(weights_x: Tensor, weights_y: Tensor, group: ProcessGroup | None) -> None:
    """Check the masses, if that needs no synchronisation with a device and the values are available."""
    if weights_x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, weights in (("weights_x", weights_x), ("weights_y", weights_y)):
        if arguments.number_in((weights >= 0).all()) is False:
            raise ValueError(f"{name} must be 0 or more")
    masses = (_group.total(group, weights.detach().double().sum()) for weights in (weights_x, weights_y))
    x, y = (arguments.number_in(mass) for mass in masses)
    if x is not None and y is not None and (not abs(x - y) <= 1e-2 * max(x, y) or x == 0):
        raise ValueError(f"weights_x and weights_y must have the same sum above 0, got {x:.6g} and {y:.6g}")


@by_parts
def sinkhorn_divergence(
    x: Tensor, y: Tensor, blur: float = 0.05, *, weights_x: Tensor | None = None, weights_y: Tensor | None = None,
    scaling: float = 0.5, debias: bool = True, diameter: float | None = None, final_updates: int = 0,
    group: ProcessGroup | None = None,
) -> Tensor:  # fmt: skip
    """Sinkhorn divergence of two weighted samples for the cost |x - y|^2 / 2, as GeomLoss defines it.

    S = OT(x, y) - (OT(x, x) + OT(y, y)) / 2, OT(x, y) = min over plans pi of <pi, C> + blur^2 KL(pi || a b^T)

    As blur -> 0 it tends to W_2^2 / 2. The potentials are averaged with their updates, in the log domain, while the
    temperature eps falls from diameter^2 to blur^2, times scaling^2 at each step. The gradient is that of one more
    update at the end (envelope theorem).

    Args:
        x, y: points [N, D] and [M, D].
        blur: the length below which details are smoothed out, in units of x; above 0.
        weights_x, weights_y: [N] and [M], 0 or more, with equal sums (checked on a CPU only); None is 1 / N and 1 / M.
            Their gradient is the potential.
        scaling: between 0 and 1; values near 1 take more steps and give a smaller error.
        debias: False gives OT(x, y), whose minimum is not at x = y.
        diameter: the initial length, such as the distance of the farthest two points; None is the diagonal of the
            points' box, which needs a synchronisation with a GPU (give it under torch.compile(fullgraph=True)).
        final_updates: number of further updates at the last temperature. GeomLoss has none, and its potentials and
            gradient are then some tenths of a per cent off. Some tens let them converge unless blur is small.
        group: a torch.distributed process group; the points are then those of all its processes, every process gets the
            same value, and each updates its own points' potentials. None: this process's points.

    Returns:
        One number, float32 for float16, bfloat16 and float32 input, float64 if any input is. It stores the costs of at
        most 2^18 pairs, on a CPU, in 4 MiB; for more it needs no tensor of size N x M, only tiles of 3 MiB on a CPU.
        The gradient needs tensors of the inputs' sizes. A second derivative raises an error.

        Each of R processes with n and m points sends them once, and at every update, in float32, 8 (R - 1) (n + m)
        bytes for the potentials (half if not debias); backward, one number.

    Raises:
        TypeError: an argument is not a floating-point tensor or not a number, group is not a process group.
        ValueError: shapes do not match; a coordinate is infinite; weights are below 0 or have unequal sums; blur or
            diameter is not above 0, or scaling is not between 0 and 1.
        RuntimeError: the gradient is differentiated.

    Source: Feydy et al. 2019, "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences",
    arXiv:1810.08278; Feydy 2020, "Geometric data analysis, beyond convolutions", algorithm 3.5.

    >>> import torch, fastkl
    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> f"{fastkl.sinkhorn_divergence(x, x + 1.0):.3f}"  # |shift|^2 / 2
    '1.500'
    """
    arguments.check_samples(part=group is not None, x=x, y=y)
    arguments.check_tensors(x=x, weights_x=weights_x, weights_y=weights_y)
    blur, scaling = (arguments.check_number(*each, above=True) for each in (("blur", blur), ("scaling", scaling)))
    if scaling >= 1:
        raise ValueError(f"scaling must be below 1, got {scaling}")
    diameter = -1.0 if diameter is None else arguments.check_number("diameter", diameter, above=True)
    final_updates = arguments.check_int("final_updates", final_updates, 0)
    for name, points in (("x", x), ("y", y)):  # checked if that needs no synchronisation
        if arguments.number_in(points.detach().isinf().any()):
            raise ValueError(f"{name} must have finite coordinates, got an infinite one")
    given = weights_x is not None or weights_y is not None
    dtype = reference.compute_dtype(x, y, weights_x, weights_y)
    sizes = [_group.row_counts(group, points.shape[0], points.device) for points in (x, y)]
    if group is not None and not all(map(sum, sizes)):
        raise ValueError(f"x and y must have at least one point in the group, got {sum(sizes[0])} and {sum(sizes[1])}")
    weights = [
        _weights(name, own, points, sum(each), dtype)
        for name, own, points, each in zip(("weights_x", "weights_y"), (weights_x, weights_y), (x, y), sizes)
    ]
    if given:
        _check_masses(weights[0], weights[1], group)
    settings = [blur, scaling, bool(debias), diameter, final_updates, group, sizes if len(sizes[0]) > 1 else None]
    return _group.total(group, SINKHORN.value(settings, x, y, *weights))
