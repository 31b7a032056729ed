"""A number where a parameter is a tensor."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fastkl
from fastkl.ops.normal.kl_normal import kl_normal_packed
from fastkl.ops.normal.rsample_kl import rsample_kl_packed

from helpers import DEVICE

PRIOR = (0.5, -1.3)  # mean and log-variance
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


def points(dtype):
    return torch.linspace(-2, 2, 12, dtype=torch.float64, device=DEVICE).view(4, 3).to(dtype)


def packed(mu, logvar):
    return torch.cat([mu, torch.full_like(mu, logvar)], 1)


KL = {
    "kl_normal": fastkl.kl_normal,
    "kl_normal, packed": lambda mu, logvar, *prior: kl_normal_packed(packed(mu, logvar), 1, *prior, event_ndim=1),
    "rsample_kl": lambda *given: fastkl.rsample_kl(*given)[1],
    "rsample_kl, packed": lambda mu, v, *prior: rsample_kl_packed(packed(mu, v), 1, *prior, event_ndim=1)[1],
    "DiagonalNormal": lambda mu, logvar, mean, prior_logvar: fastkl.DiagonalNormal(mu, logvar).kl(
        fastkl.DiagonalNormal(mu.new_full((1, 3), mean, dtype=torch.float64), prior_logvar)
    ),
}


@every_dtype
@pytest.mark.parametrize("op", KL.values(), ids=KL)
def test_kls_take_numbers(op, dtype):
    mu, logvar = points(dtype).requires_grad_(), -0.5  # which 16 bits hold
    exact = mu.detach().double().requires_grad_()
    expected = kl_divergence(Normal(exact, math.exp(logvar / 2)), Normal(PRIOR[0], math.exp(PRIOR[1] / 2))).sum(1)
    found = op(mu, logvar, *PRIOR)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,), (wanted,) = (torch.autograd.grad(kl.sum(), x) for kl, x in ((found, mu), (expected, exact)))
    torch.testing.assert_close(gradient, wanted.to(dtype))


SAMPLERS = {
    "rsample_normal": fastkl.rsample_normal,
    "rsample_kl": lambda *given, **settings: fastkl.rsample_kl(*given, **settings)[0],
    "DiagonalNormal": lambda mu, v, scale, **noise: fastkl.DiagonalNormal(mu, v, scale=scale).rsample(**noise),
}


@every_dtype
@pytest.mark.parametrize("number", [1, 0.25, np.float32(0.5)], ids=str)
@pytest.mark.parametrize("op", SAMPLERS.values(), ids=SAMPLERS)
def test_samplers_take_a_number_and_keep_the_dtype(op, number, dtype):
    mu, eps = points(dtype), torch.randn(2, 4, 3, device=DEVICE).to(dtype)
    z = op(mu, number, scale="std", num_samples=2, eps=eps)
    torch.testing.assert_close(z, (mu.double() + float(number) * eps.double()).to(dtype))


OF_A_NUMBER = {
    **{name: op for name, op in KL.items() if "packed" not in name and name != "DiagonalNormal"},
    **{name: lambda mu, v, *_, op=op: op(mu, v, seed=1, scale="logvar") for name, op in SAMPLERS.items()},
    "kl_normal_per_dim": fastkl.kl_normal_per_dim,
    "wasserstein2_normal": fastkl.wasserstein2_normal,
}


@every_dtype
@pytest.mark.parametrize("op", OF_A_NUMBER.values(), ids=OF_A_NUMBER)
def test_the_mean_may_be_the_number(op, dtype):
    logvar = points(dtype).requires_grad_()
    for prior in ((), PRIOR):
        found, expected = op(0.25, logvar, *prior), op(torch.full_like(logvar, 0.25), logvar, *prior)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
        (gradient,), (wanted,) = (torch.autograd.grad(out.sum(), logvar) for out in (found, expected))
        torch.testing.assert_close(gradient, wanted)
    with pytest.raises(TypeError, match=r"mu must be a torch\.Tensor"):
        op(0.25, 1.0)


def test_a_posterior_with_a_number_is_one_of_tensors():
    mu = points(torch.bfloat16)
    q, full = fastkl.DiagonalNormal(mu, -0.4), fastkl.DiagonalNormal(mu, torch.full_like(mu, -0.4))
    for name in ("logvar", "std", "var", "mean"):
        torch.testing.assert_close(getattr(q, name), getattr(full, name), rtol=0, atol=0)
    torch.testing.assert_close(q.entropy(), full.entropy())
    torch.testing.assert_close(q.log_prob(mu), full.log_prob(mu))


def test_terms_of_a_batch_take_numbers():
    mu = points(torch.float32)
    z, logvar = mu + 0.1, torch.full_like(mu, -0.5)
    torch.testing.assert_close(fastkl.mmd_normal(mu, -0.5), fastkl.mmd_normal(mu, logvar))
    found, expected = fastkl.total_correlation(z, mu, -0.5, 10), fastkl.total_correlation(z, mu, logvar, 10)
    torch.testing.assert_close(tuple(found), tuple(expected))


@pytest.mark.parametrize("bad", [True, "0", 1j])
def test_what_is_no_number_is_no_parameter(bad):
    mu = points(torch.float32)
    for op in (fastkl.kl_normal, fastkl.rsample_normal, fastkl.rsample_kl, fastkl.mmd_normal, fastkl.DiagonalNormal):
        with pytest.raises(TypeError, match=r"^logvar must be a torch.Tensor"):
            op(mu, bad)
    with pytest.raises(TypeError, match=r"^prior_mu must be a torch.Tensor"):
        fastkl.rsample_kl(mu, mu, bad, 0.0)


def test_nan_is_a_number():
    mu = points(torch.float32)
    assert fastkl.DiagonalNormal(mu, math.nan).kl().isnan().all()
    assert fastkl.rsample_normal(mu, math.nan).isnan().all()


def test_numbers_compile_for_any_value():
    mu = points(torch.float32)
    draw = lambda mu, v: fastkl.DiagonalNormal(mu, v).rsample(eps=mu)  # noqa: E731
    compiled = torch.compile(draw, backend="eager", fullgraph=True)
    for number in (0.5, 1.5, 2.5):
        torch.testing.assert_close(compiled(mu, number), mu + math.exp(number / 2) * mu)
