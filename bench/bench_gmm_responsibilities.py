"""gmm_responsibilities: against broadcasting."""

import fastkl
from bench.case import Case, leaves
from fastkl import reference


def cases(device, quick):
    functions = reference.gmm_responsibilities, fastkl.gmm_responsibilities, reference.gmm_responsibilities
    for n, k, d in [(128, 10, 8)] if quick else [(16384, 512, 64) if device == "cuda" else (1024, 100, 32)]:
        yield Case(f"{n} x {k} x {d}", leaves(device, (n, d), (k,), (k, d), (k, d)), *functions)
