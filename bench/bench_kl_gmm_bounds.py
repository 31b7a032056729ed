"""kl_gmm_bounds: both bounds at once, against the formulas written out by broadcasting, and one call for each."""

import torch

import fastkl
from fastkl import reference

from harness import Case, leaves


def by_broadcasting(*inputs):
    return torch.stack(reference.kl_gmm_bounds(*inputs))


def together(*inputs):
    return torch.stack(fastkl.kl_gmm_bounds(*inputs))


def one_by_one(*inputs):
    return torch.stack([fastkl.kl_gmm(*inputs, method=method) for method in ("lower", "upper")])


def cases(device, quick):
    for n, k, d in [(128, 10, 8)] if quick else [(128, 10, 8), (512, 100, 32), (1024, 128, 64)]:
        inputs = leaves(device, (n, d), (n, d), (k,), (k, d), (k, d))
        yield Case(f"{n} x {k} x {d}", inputs, by_broadcasting, together)
        yield Case(f"{n} x {k} x {d}, one call for each", inputs, by_broadcasting, one_by_one)
