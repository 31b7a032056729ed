"""sliced_wasserstein: two sorts of all projections (eager), against blocks of projections sorted once."""

import functools

import torch

import fastkl
from bench.case import Case, leaves
from fastkl import reference


def formula(x, y, projections, unit=None):
    if unit is None:
        unit = torch.nn.functional.normalize(torch.randn(projections, x.shape[1], device=x.device))
    first, second = ((unit @ points.T).sort(-1).values for points in (x, y))
    return (first - second).square().mean()


def definition(x, y, projections, seed):
    """The definition in float32, because float64 would sort near ties differently and match other points."""
    return reference.sliced_wasserstein(x.float(), y.float(), projections, 2, seed)


def cases(device, quick):
    seed = torch.zeros((), dtype=torch.int64, device=device)
    sizes = [(256, 64, 50)]  # with more points, some near ties are matched differently by any two float32 sorts
    for n, d, projections in sizes:
        eager = functools.partial(formula, projections=projections)
        ours = functools.partial(fastkl.sliced_wasserstein, num_projections=projections)
        truth = functools.partial(definition, projections=projections, seed=seed)
        unit = reference.projections(seed, projections, d)
        given = {"eager": functools.partial(eager, unit=unit), "fastkl": functools.partial(ours, seed=seed)}
        name = f"{n} x {d}, {projections} projections"
        # Two different distributions: for equal ones the gradient mostly depends on the order of near ties.
        x, y = leaves(device, (n, d), (n, d))
        inputs = [x, (y.detach() + 1).requires_grad_()]
        yield Case(name, inputs, eager, ours, truth, same_noise=given)
