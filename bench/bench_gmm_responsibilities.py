"""gmm_responsibilities: against broadcasting."""

import fastkl
from fastkl import reference

from harness import Case, leaves


def cases(device, quick):
    for n, k, d in [(128, 10, 8)] if quick else [(128, 10, 8), (1024, 100, 32)]:
        inputs = leaves(device, (n, d), (k,), (k, d), (k, d))
        yield Case(f"{n} x {k} x {d}", inputs, reference.gmm_responsibilities, fastkl.gmm_responsibilities)
    n, k, d = (64, 10, 8) if quick else (512, 50, 64)
    inputs = leaves(device, (n, d), (n, k), (n, k, d), (n, k, d))
    yield Case(f"{n} x {k} x {d} per datum", inputs, reference.gmm_responsibilities, fastkl.gmm_responsibilities)
