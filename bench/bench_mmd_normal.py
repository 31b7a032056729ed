"""mmd_normal: squared discrepancy of points, and of Gaussian posteriors, to N(0, I) in closed form."""

import fastkl
from bench.case import Case, leaves
from fastkl import reference


def cases(device, quick):
    # Small sizes, because the eager formula saves some dozens of N x N x D tensors.
    functions = reference.mmd_normal, fastkl.mmd_normal, reference.mmd_normal
    n, d = (128, 32) if quick else (1024 if device == "cuda" else 256, 64)
    # Points not from N(0, I): for equal distributions a float32 formula gives mostly rounding error.
    points = [(tensor.detach() + 1).requires_grad_() for tensor in leaves(device, (n, d))]
    yield Case(f"{n} x {d} points", points, *functions)
    yield Case(f"{n} x {d} posteriors", leaves(device, (n, d), (n, d)), *functions)
