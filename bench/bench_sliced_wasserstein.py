"""sliced_wasserstein: the usual two sorts of all projections, against blocks of projections sorted once."""

import functools

import torch

import fastkl
from fastkl import reference

from harness import Case, leaves


def formula(x, y, projections, seed, unit=None):
    if len(x) != len(y):
        return reference.sliced_wasserstein(x, y, projections, 2, seed)
    if unit is None:
        unit = torch.nn.functional.normalize(torch.randn(projections, x.shape[1], device=x.device))
    first, second = ((unit @ points.T).sort(-1).values for points in (x, y))
    return (first - second).square().mean()


def cases(device, quick):
    seed = torch.zeros((), dtype=torch.int64, device=device)
    sizes = [(256, 256, 64, 50), (1024, 1024, 64, 128), (16384, 16384, 64, 128), (4096, 3000, 64, 128)]
    for n, m, d, projections in sizes[:1] if quick else sizes:
        eager = functools.partial(formula, projections=projections, seed=seed)
        same = functools.partial(eager, unit=reference.projections(seed, projections, d))
        fused = functools.partial(fastkl.sliced_wasserstein, num_projections=projections)
        name = f"{n} and {m} x {d}, {projections} projections"
        yield Case(name, leaves(device, (n, d), (m, d)), eager, fused, (same, functools.partial(fused, seed=seed)))
