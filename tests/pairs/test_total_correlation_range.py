"""total_correlation where standard deviations are not in float32's range, or differ by more than it: the truth is the
formula in float64, written apart."""

import math

import pytest
import torch
from test_total_correlation import COTANGENTS, implementation

import fastkl
from fastkl import reference

from helpers import DEVICE, leaf

every = pytest.mark.parametrize("backend", ["reference", "all pairs", "blocks", "triton"])
DATASET = 100


def three_parts(z, mu, logvar):
    """[n, 3] for "mss", with what the sums over j are made of in logarithms."""
    n, others = len(z), len(z) - 1
    weights = torch.full((n, n), 1 / others, dtype=z.dtype, device=z.device)
    for i in range(n):
        weights[i, i] = 1 / DATASET
        weights[i, (i + 1) % n] = (DATASET - others) / (DATASET * others)
    log = -0.5 * (math.log(2 * math.pi) + logvar + (z.unsqueeze(1) - mu) ** 2 * torch.exp(-logvar))
    joint = torch.logsumexp(weights.log() + log.sum(2), 1)
    marginals = torch.logsumexp(weights.log().unsqueeze(2) + log, 1).sum(1)
    prior = -0.5 * (math.log(2 * math.pi) + z**2).sum(1)
    return torch.stack([log.sum(2).diagonal() - joint, joint - marginals, marginals - prior], 1)


def batch(case):
    generator = torch.Generator().manual_seed(3)
    mu, eps = (torch.randn(4, 2, generator=generator) for _ in range(2))
    logvar = torch.full((4, 2), -2.0)
    if case == "wide":
        logvar[:] = 200.0
    if case == "narrow":  # the samples are the means, to the last place
        logvar[:], eps[:] = -200.0, 0.0
    if case == "alternating":
        logvar[::2], logvar[1::2] = 90.0, -90.0
    z = mu + eps if case == "wide" else mu + torch.exp(0.5 * logvar) * eps
    if case.startswith("a wide"):  # its sample is the next one's mean, whose own lies 1e21 or more sigma from it
        logvar[0], logvar[1] = (100.0, -100.0) if case.endswith("100") else (300.0, -300.0)
        z[0], z[1] = mu[1], mu[1] + 1.0
    return [z, mu, logvar]


def run(function, tensors):
    parts = function(*tensors)
    n = len(tensors[0])
    cotangents = [torch.linspace(*ends, n, device=DEVICE).to(parts[0].dtype) for ends in COTANGENTS]
    return [torch.stack(list(parts), 1).detach(), *torch.autograd.grad(parts, tensors, cotangents)]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["wide", "narrow", "alternating", "a wide one, 100", "a wide one, 300"])
def test_densities_out_of_range_leave_their_ratios_right(backend, case, dtype):
    """exp(-logvar / 2) leaves float32 at +-177; the exponentials' exponents have the difference of log-variances."""
    exact = run(lambda *given: three_parts(*given).unbind(1), [leaf(t.to(dtype).double()) for t in batch(case)])
    tensors = [leaf(t.to(dtype)) for t in batch(case)]
    if backend == "reference":
        found = run(lambda *given: reference.total_correlation(*given, DATASET), tensors)
    else:
        with implementation(backend):
            found = run(lambda *given: fastkl.total_correlation(*given, DATASET), tensors)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for actual, truth in zip(found, exact):
        torch.testing.assert_close(actual, truth.to(dtype), **near)


@pytest.mark.parametrize("backend", ["all pairs", "blocks", "triton"])
def test_infinitely_far_row_of_weight_zero_has_no_gradient(backend):
    z, mu, logvar = batch("usual")
    z[2] = 1e30
    tensors, kept = [leaf(t) for t in (z, mu, logvar)], torch.tensor([1.0, 1.0, 0.0, 1.0], device=DEVICE)
    with implementation(backend):
        parts = fastkl.total_correlation(*tensors, DATASET)
        found = torch.autograd.grad(parts, tensors, [kept] * 3)
    wide = [leaf(t.double()) for t in (z, mu, logvar)]
    exact = torch.autograd.grad(three_parts(*wide)[kept > 0].sum(), wide)
    for actual, truth in zip(found, exact):
        torch.testing.assert_close(actual, truth.float(), rtol=1e-4, atol=1e-5)
