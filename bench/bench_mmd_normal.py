"""mmd_normal: squared discrepancy of points, and of Gaussian posteriors, to N(0, I) in closed form."""

import fastkl
from fastkl import reference

from harness import Case, leaves


def cases(device, quick):
    for n, d in [(128, 32)] if quick else [(128, 32), (1024, 64)]:
        points, posteriors = leaves(device, (n, d)), leaves(device, (n, d), (n, d))
        yield Case(f"{n} x {d} points", points, reference.mmd_normal, fastkl.mmd_normal)
        if n * n * d <= 1 << 22:  # the eager formula keeps some dozens of N x N x D tensors
            yield Case(f"{n} x {d} posteriors", posteriors, reference.mmd_normal, fastkl.mmd_normal)
