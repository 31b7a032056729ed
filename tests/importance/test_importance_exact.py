"""The importance-weighted objectives on a model that is solved exactly: p(z) = N(0, I), p(x | z) = N(z, I)."""

import math
import runpy
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl import objectives

from gmm_helpers import draw
from helpers import DEVICE

GRADIENTS = ("plain", "stl", "dreg")
SETTINGS = {
    "iwae": {"num_samples": 12},
    "miwae": {"num_samples": 4, "num_estimates": 3},
    "ciwae": {"num_samples": 12, "beta": 0.3},
    "piwae": {"num_samples": 4, "num_estimates": 3},
}


def likelihood_of(x):
    return lambda z: fastkl.normal_log_prob(x, z, torch.zeros((), device=DEVICE), event_ndim=1)


def evidence(x):
    """ln N(x; 0, 2 I)."""
    return (-0.25 * x.square() - 0.5 * math.log(4 * math.pi)).sum(-1)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_at_the_exact_posterior(name, gradient):
    """All weights are p(x): the bound is ln p(x) whatever L, and only the plain gradient has noise."""
    x = 2 * draw(5, 2)
    mu, logvar = (x / 2).requires_grad_(), torch.full_like(x, math.log(0.5)).requires_grad_()
    q = fastkl.DiagonalNormal(mu, logvar)
    objective = getattr(objectives, name)
    loss, terms = objective(q, None, likelihood_of(x), gradient=gradient, eps=draw(12, 5, 2, seed=1), **SETTINGS[name])
    torch.testing.assert_close(loss, -evidence(x).mean(), rtol=1e-13, atol=0)
    assert terms["bound"] == -loss
    count = SETTINGS[name]["num_samples"]
    assert terms["effective_sample_size"].item() == pytest.approx(count, rel=1e-12)
    assert terms["weight_entropy"].item() == pytest.approx(math.log(count), rel=1e-12)
    for d in torch.autograd.grad(loss, [mu, logvar]):
        assert d.abs().min() > 1e-4 if gradient == "plain" else d.abs().max() < 1e-14


def test_below_the_evidence_and_tighter_with_more_samples():
    repeats = 4000
    x = torch.full((repeats, 1), 1.0, dtype=torch.float64, device=DEVICE)
    q = fastkl.DiagonalNormal(x / 2 + 1, torch.zeros_like(x))
    exact, previous = evidence(x)[0], -math.inf
    for count in (1, 3, 9):
        z = q.rsample(eps=draw(count, repeats, 1, seed=count), num_samples=count)
        prior = fastkl.normal_log_prob(z, *torch.zeros(2, 1, device=DEVICE), event_ndim=1)
        bounds = fastkl.iwae(likelihood_of(x)(z) + prior - q.log_prob(z))
        mean, error = bounds.mean(), bounds.std() / math.sqrt(repeats)
        assert previous + 4 * error < mean < exact - 4 * error
        previous = mean
        loss = objectives.iwae(
            q, None, likelihood_of(x), num_samples=count, eps=draw(count, repeats, 1, seed=count)
        ).loss
        torch.testing.assert_close(loss, -mean)


BENCH = runpy.run_path(Path(__file__).parents[2] / "bench" / "iwae_snr.py")


def test_dreg_is_unbiased_and_stl_is_not():
    """As L grows STL tends to (x / 2 - mu) / sigma^2, the mean over the posterior of d ln w / dz, the bound's to 0."""
    few = {name: BENCH["gradients"](name, 4, 40_000, seed) for seed, name in enumerate(GRADIENTS)}
    errors = {name: values.std(0) / math.sqrt(len(values)) for name, values in few.items()}
    means = {name: values.mean(0) for name, values in few.items()}
    both = (errors["plain"].square() + errors["dreg"].square()).sqrt()
    assert ((means["plain"] - means["dreg"]).abs() < 4 * both).all()
    assert (means["plain"].abs() > 10 * both).all()
    limit = (BENCH["X"] / 2 - BENCH["MU"]) / BENCH["VARIANCE"]
    assert means["stl"][0] < means["dreg"][0] - 100 * errors["stl"][0]
    assert BENCH["gradients"]("stl", 1000, 200)[:, 0].mean().item() == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize(
    ("gradient", "repeats", "low", "high"), [("plain", 20_000, -0.65, -0.4), ("dreg", 500, 0.4, 0.6)]
)
def test_signal_to_noise(gradient, repeats, low, high):
    """Of the gradient in q's mean: plain it falls as 1 / sqrt(L), doubly reparameterised it grows as sqrt(L)."""
    samples = (4, 16, 64)
    values = [BENCH["gradients"](gradient, count, repeats)[:, 0] for count in samples]
    assert low < BENCH["slope"](samples, [(v.mean().abs() / v.std()).item() for v in values]) < high
