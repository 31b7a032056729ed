"""kl_gmm_bounds: both bounds in one call, against the formulas by broadcasting."""

import torch

import fastkl
from bench.case import Case, leaves
from fastkl import reference


def by_broadcasting(*inputs):
    return torch.stack(reference.kl_gmm_bounds(*inputs))


def together(*inputs):
    return torch.stack(fastkl.kl_gmm_bounds(*inputs))


def cases(device, quick):
    for n, k, d in [(128, 10, 8)] if quick else [(16384, 512, 64) if device == "cuda" else (512, 100, 32)]:
        inputs = leaves(device, (n, d), (n, d), (k,), (k, d), (k, d))
        yield Case(f"{n} x {k} x {d}", inputs, by_broadcasting, together, by_broadcasting)
