"""sinkhorn_divergence: against GeomLoss where it is installed (its matrices of costs), else the dense definition."""

import functools

import torch

import fastkl
from fastkl import reference

from harness import Case, leaves

try:
    from geomloss import SamplesLoss
except ImportError:
    SamplesLoss = None


def cases(device, quick):
    for n, d in [(256, 16)] if quick else [(256, 16), (1024, 64), (4096, 64)]:
        x, y = leaves(device, (n, d), (n, d))
        y = (0.8 * y.detach() + 0.3).requires_grad_()
        blur = 1.0  # where float32 is still fine for GeomLoss's costs, expanded around the origin
        eager = functools.partial(reference.sinkhorn_divergence, blur=blur)
        if SamplesLoss is not None:
            eager = torch.compiler.disable(SamplesLoss("sinkhorn", blur=blur, backend="tensorized"))
        yield Case(f"{n} x {d}, blur {blur}", [x, y], eager, functools.partial(fastkl.sinkhorn_divergence, blur=blur))
