"""sinkhorn_divergence: against the dense definition, and GeomLoss if installed (with its cost matrices)."""

import functools

import torch

import fastkl
from bench.case import Case, leaves
from fastkl import reference

try:
    from geomloss import SamplesLoss
except ImportError:
    SamplesLoss = None

SIZES = ((256, 16), (1024, 64))
BLUR = 1.0  # large enough for GeomLoss's expanded squares, whose costs are inexact in float32


def cases(device, quick):
    definition = functools.partial(reference.sinkhorn_divergence, blur=BLUR)
    ours = functools.partial(fastkl.sinkhorn_divergence, blur=BLUR)
    for n, d in [(128, 16)] if quick else SIZES:
        x, y = leaves(device, (n, d), (n, d))
        inputs = [x, (0.8 * y.detach() + 0.3).requires_grad_()]
        others = {}
        if SamplesLoss is not None:
            others["geomloss"] = torch.compiler.disable(SamplesLoss("sinkhorn", blur=BLUR, backend="tensorized"))
        yield Case(f"{n} x {d}, blur {BLUR}", inputs, definition, ours, definition, others, every_count=True)
