"""sliced_wasserstein: the usual two sorts of all projections, against blocks of projections sorted once."""

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


def cases(device, quick):
    seed = torch.zeros((), dtype=torch.int64, device=device)
    sizes = [(256, 64, 50), (4096, 64, 128)]
    for n, d, projections in sizes[:1] if quick else sizes:
        eager = functools.partial(formula, projections=projections)
        ours = functools.partial(fastkl.sliced_wasserstein, num_projections=projections)
        definition = functools.partial(reference.sliced_wasserstein, num_projections=projections, p=2, seed=seed)
        unit = reference.projections(seed, projections, d)
        given = {"eager": functools.partial(eager, unit=unit), "fastkl": functools.partial(ours, seed=seed)}
        name = f"{n} x {d}, {projections} projections"
        # Two samples that differ: of the same distribution the gradient is mostly the order of near ties.
        x, y = leaves(device, (n, d), (n, d))
        inputs = [x, (y.detach() + 1).requires_grad_()]
        yield Case(name, inputs, eager, ours, definition, same_noise=given)
