"""kl(method="relaxed") of mixture priors: definition, limit, gradients, and memory."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, kl_divergence

import fastkl
from fastkl import reference
from fastkl.priors import GaussianMixture
from fastkl.priors._relaxed import kl_relaxed

from helpers import DEVICE
from prior_helpers import D, K, choice_noise, mixture, posterior

SMOOTH = ("diag", "spherical", "tied")
smooth = pytest.mark.parametrize("covariance", SMOOTH)


def normal(mean, logvar) -> Independent:
    return Independent(Normal(mean, (0.5 * logvar).exp()), 1)


def each_kl(prior, q) -> torch.Tensor:
    """KL(q || N_k) [*batch, K]."""
    q = normal(q.mean.unsqueeze(-2), q.logvar.unsqueeze(-2))
    return kl_divergence(q, normal(prior.means, prior.logvars.expand(prior.means.shape)))


def choice_kl(prior, z) -> torch.Tensor:
    """KL(r || pi) [L, *batch], r = p(k | z)."""
    log_r = prior.responsibilities(z)
    return (log_r.exp() * (log_r - torch.log_softmax(prior.logits, -1))).sum(-1)


def overlapping(covariance: str, dim: int = D) -> GaussianMixture:
    """Components of which any may have made z, so that the choice is a choice."""
    prior = mixture(covariance, dim=dim)
    with torch.no_grad():
        prior.means.mul_(0.4)
        prior.logvars.mul_(0.3).add_(0.5)
    return prior


def repeated(q, count: int) -> fastkl.DiagonalNormal:
    return fastkl.DiagonalNormal(*(t.detach().expand(count, *t.shape) for t in (q.mean, q.logvar)), event_ndim=1)


def assert_mean_is(values, expected, errors: float = 5.0) -> None:
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() < errors * error).all()
    assert (error < 0.05 * (1 + expected)).all(), "a test that can fail"


@smooth
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_it_is_the_formula_with_all_its_gradients(covariance, tau):
    prior, q, gumbel = overlapping(covariance), posterior(), choice_noise(2, 6, K)
    z = q.rsample(num_samples=2, seed=4)
    y = torch.softmax((prior.responsibilities(z) + gumbel) / tau, -1)
    sigma = y @ (0.5 * prior.logvars).exp().expand(prior.means.shape)
    relaxed = normal(y @ prior.means, 2 * sigma.log())
    expected = (kl_divergence(normal(q.mean, q.logvar), relaxed) + choice_kl(prior, z)).mean(0)
    inputs = (*q.tensors, *prior.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), inputs, retain_graph=True)
    for temperature in (tau, torch.tensor(tau, dtype=torch.float64, device=DEVICE)):
        actual = prior.kl_relaxed(q, z, temperature, gumbel=gumbel)
        torch.testing.assert_close(actual, expected)
        found = torch.autograd.grad(actual.square().sum(), inputs, retain_graph=True)
        torch.testing.assert_close(found, wanted)


@smooth
def test_cold_it_is_the_kl_to_the_chosen_component(covariance):
    prior, q, gumbel = overlapping(covariance), posterior(), choice_noise(2, 6, K)
    z = q.rsample(num_samples=2, seed=4)
    chosen = (prior.responsibilities(z) + gumbel).argmax(-1)
    assert len(chosen.unique()) > 2
    one = each_kl(prior, q).expand(2, 6, K).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    expected = (one + choice_kl(prior, z)).mean(0)
    for tau in (0.0, 1e-6):
        torch.testing.assert_close(prior.kl_relaxed(q, z, tau, gumbel=gumbel), expected, rtol=1e-6, atol=1e-6)
    # The mean over the noise: the objective of VaDE at this z.
    n = 20_000
    drawn = prior.kl_relaxed(repeated(q, n), z[:1].unsqueeze(1).expand(1, n, 6, D), 1e-3, seed=1)
    assert_mean_is(drawn, (prior.responsibilities(z[0]).exp() * each_kl(prior, q)).sum(-1) + choice_kl(prior, z[0]))


@smooth
def test_cold_its_mean_is_an_upper_bound(covariance):
    """In one dimension, by quadrature over q: the bound at every z, and its mean, which the samples find."""
    prior, q, n = overlapping(covariance, 1), posterior(4, 1), 20_000
    with torch.no_grad():
        line = torch.linspace(-12, 12, 2401, dtype=torch.float64, device=DEVICE).view(-1, 1, 1)
        weight = torch.exp(-0.5 * line.square()).squeeze(-1) * 0.01 / math.sqrt(2 * math.pi)
        z = q.mean + q.std * line
        truth = (weight * (q.log_prob(z) - prior.log_prob(z))).sum(0)
        bound = (prior.responsibilities(z).exp() * each_kl(prior, q)).sum(-1) + choice_kl(prior, z)
        assert (bound >= prior.kl(q, method="upper") - 1e-9).all()
        assert (bound >= truth - 1e-9).all()
        drawn = prior.kl(repeated(q, n), method="relaxed", tau=1e-3, num_samples=2, seed=1)
        assert_mean_is(drawn, (weight * bound).sum(0))


@smooth
def test_one_component_is_a_gaussian(covariance):
    prior, q = mixture(covariance, 1), posterior()
    expected = fastkl.kl_normal(q.mean, q.logvar, prior.means[0], prior.logvars[0].expand(D))
    for tau in (0.0, 0.5, 3.0):
        actual = prior.kl(q, method="relaxed", tau=tau, num_samples=3, seed=1)
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def test_draws_equal_monte_carlo_with_separate_choice_noise():
    prior, q = mixture(), posterior()
    z = fastkl.rsample_normal(q.mean, q.logvar, num_samples=3, seed=8)
    monte_carlo = -reference.normal_entropy(q.logvar) - prior.log_prob(z).mean(0)
    torch.testing.assert_close(prior.kl(q, num_samples=3, seed=8), monte_carlo)
    actual = prior.kl(q, method="relaxed", num_samples=3, seed=8, tau=0.7)
    assert torch.equal(actual, prior.kl_relaxed(q, z, 0.7, seed=8))
    assert not torch.equal(actual, prior.kl(q, method="relaxed", num_samples=3, seed=9, tau=0.7))
    torch.manual_seed(0)
    first = prior.kl(q, method="relaxed")
    assert not torch.equal(first, prior.kl(q, method="relaxed"))
    torch.manual_seed(0)
    assert torch.equal(first, prior.kl(q, method="relaxed"))


@smooth
def test_gradients_are_those_of_finite_differences(covariance):
    prior, q = mixture(covariance), posterior(2)
    tau = torch.tensor(0.7, dtype=torch.float64, device=DEVICE, requires_grad=True)
    seed = torch.tensor(5, device=DEVICE)

    def loss(mu, logvar, logits, means, logvars, tau):
        z = fastkl.rsample_normal(mu, logvar, num_samples=2, seed=3)
        return kl_relaxed(mu, logvar, z, (logits, means, logvars, None), tau, "exact", seed, None)

    assert gradcheck(loss, (*q.tensors, prior.logits, prior.means, prior.logvars, tau))
