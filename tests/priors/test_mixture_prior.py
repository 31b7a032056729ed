"""Mixture priors: densities and samples by oracles, KL and its bounds by quadrature."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import fastkl
from fastkl import priors
from fastkl.priors import GaussianMixture

from helpers import DEVICE
from prior_helpers import COVARIANCES, D, K, mixture, posterior

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_density_is_that_of_torch_and_scipy(covariance):
    prior, z = mixture(covariance), 3 * torch.randn(5, 2, D, dtype=torch.float64, device=DEVICE)
    components = MultivariateNormal(prior.means, scale_tril=prior.scale_tril)
    expected = MixtureSameFamily(Categorical(logits=prior.logits), components)
    torch.testing.assert_close(prior.log_prob(z), expected.log_prob(z), rtol=1e-12, atol=1e-12)
    covariances = (prior.scale_tril @ prior.scale_tril.mT).detach().cpu().numpy()
    each = [stats.multivariate_normal(m, s).pdf(z.cpu()) for m, s in zip(prior.means.detach().cpu(), covariances)]
    weighted = np.stack(each, -1) * torch.softmax(prior.logits, -1).detach().cpu().numpy()
    total = torch.from_numpy(weighted.sum(-1)).to(DEVICE)
    torch.testing.assert_close(prior.log_prob(z).exp(), total, rtol=1e-10, atol=0)
    shares = torch.from_numpy(weighted).to(DEVICE) / total.unsqueeze(-1)
    torch.testing.assert_close(prior.responsibilities(z).exp(), shares, rtol=1e-9, atol=1e-12)
    usage, mean = prior.usage(z), shares.mean((0, 1))
    torch.testing.assert_close(usage.shares, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(usage.entropy, -(mean * mean.log()).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_new_mixture_has_the_moments_of_the_standard_normal(covariance):
    torch.manual_seed(2)
    prior = GaussianMixture(4000, D, covariance)
    scale = prior.scale_tril[0]
    torch.testing.assert_close(prior.means.T.cov() + scale @ scale.T, torch.eye(D), rtol=0, atol=0.05)
    torch.testing.assert_close(prior.means.mean(0), torch.zeros(D), rtol=0, atol=0.05)
    assert torch.equal(prior.logits, torch.zeros(4000))


def test_used_components_are_those_above_a_tenth_of_an_equal_share():
    prior = GaussianMixture(3, 1).to(DEVICE)
    with torch.no_grad():
        prior.means.copy_(torch.tensor([[-50.0], [0.0], [50.0]]))
    z = torch.tensor([0.0, 50.0], device=DEVICE).repeat_interleave(torch.tensor([96, 4], device=DEVICE)).unsqueeze(1)
    usage = prior.usage(z)
    assert usage.shares.tolist() == pytest.approx([0.0, 0.96, 0.04], abs=1e-6)
    assert usage.used == 2, "0.04 is more than 1 / 30"
    assert prior.usage(torch.cat([z, z[:25]])).used == 1, "4 / 125 is less"
    assert usage.entropy.item() == pytest.approx(-0.96 * math.log(0.96) - 0.04 * math.log(0.04), rel=1e-4)


@pytest.mark.parametrize(("covariance", "dim"), [(c, d) for c in COVARIANCES for d in (1, 2)])
def test_bounds_enclose_the_integral_and_samples_find_it(covariance, dim):
    prior, q = mixture(covariance, dim=dim), posterior(4, dim)
    with torch.no_grad():
        # The midpoint rule in units of q's deviations: exact to rounding for what decays so fast.
        line = torch.linspace(-12, 12, 1201, dtype=torch.float64, device=DEVICE)[:: 1 if dim == 1 else 3]
        grid = torch.cartesian_prod(*[line] * dim).view(-1, 1, dim)
        z = q.mean + q.std * grid
        weight = torch.exp(-0.5 * grid.square().sum(-1)) * ((line[1] - line[0]) / math.sqrt(2 * math.pi)) ** dim
        truth = (weight * (q.log_prob(z) - prior.log_prob(z))).sum(0)
        lower, upper = prior.kl_bounds(q)
        assert (lower <= truth + 1e-9).all()
        assert (truth <= upper + 1e-9).all()
        assert torch.equal(lower, prior.kl(q, method="lower"))
        assert torch.equal(upper, prior.kl(q, method="upper"))
        each = [GaussianMixture(1, dim, "full").double().to(DEVICE) for _ in range(K)]
        for k, one in enumerate(each):
            one._assign(prior.logits[k : k + 1], prior.means[k : k + 1], None, prior.scale_tril[k : k + 1])
        kl = torch.stack([one.kl(q, method="upper") for one in each], -1)
        convex = (torch.softmax(prior.logits, -1) * kl).sum(-1)
        assert (upper <= convex + 1e-9).all(), "ln is concave"
        many = fastkl.DiagonalNormal(*(t.expand(4000, 4, dim) for t in (q.mean, q.logvar)), event_ndim=1)
        samples = prior.kl(many, num_samples=2, seed=1)
        error = samples.std(0) / math.sqrt(len(samples))
        assert ((samples.mean(0) - truth).abs() < 5 * error).all()
        assert (error < 0.05 * (1 + truth)).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_component_is_a_gaussian(covariance):
    prior, q = mixture(covariance, 1), posterior()
    expected = fastkl.kl_multivariate_normal(
        q.mean, torch.diag_embed(q.std), prior.means.expand(6, D), prior.scale_tril.expand(6, D, D)
    )
    torch.testing.assert_close(prior.kl(q, method="upper"), expected, rtol=1e-10, atol=1e-10)
    normal = priors.LearnedNormal(D).double().to(DEVICE)
    if covariance == "diag":
        with torch.no_grad():
            normal.mu.copy_(prior.means[0])
            normal.logvar.copy_(prior.logvars[0])
        torch.testing.assert_close(normal.kl(q), expected, rtol=1e-10, atol=1e-10)
        z = torch.randn(7, D, dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(normal.log_prob(z), prior.log_prob(z), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_permuting_components_and_shifting_everything_change_nothing(covariance):
    prior, q = mixture(covariance), posterior()
    other = copy.deepcopy(prior)
    with torch.no_grad():
        for parameter in other.parameters():
            if len(parameter) == K:
                parameter.copy_(parameter[torch.tensor([2, 0, 3, 1], device=DEVICE)])
        other.means.add_(7.0)
    moved = fastkl.DiagonalNormal(q.mean + 7.0, q.logvar)
    for settings in ({"method": "upper"}, {"method": "lower"}, {"num_samples": 5, "seed": 1}):
        torch.testing.assert_close(prior.kl(q, **settings), other.kl(moved, **settings), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prior.log_prob(q.mean), other.log_prob(moved.mean), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_samples_have_the_moments_of_the_mixture(covariance):
    prior, n = mixture(covariance), 40_000
    with torch.no_grad():
        pi, outer = torch.softmax(prior.logits, -1), prior.means.unsqueeze(-1) * prior.means.unsqueeze(-2)
        mean = pi @ prior.means
        second = torch.einsum("k,kij->ij", pi, prior.scale_tril @ prior.scale_tril.mT + outer)
    z = prior.sample(n, seed=1)
    products = z.unsqueeze(-1) * z.unsqueeze(-2)
    assert ((z.mean(0) - mean).abs() < 5 * z.std(0) / math.sqrt(n)).all()
    assert ((products.mean(0) - second).abs() < 5 * products.std(0) / math.sqrt(n)).all()
    one = prior.sample(n, component=2, seed=2)
    covariance = (prior.scale_tril @ prior.scale_tril.mT)[2]
    torch.testing.assert_close(one.mean(0), prior.means[2].detach(), rtol=0, atol=0.2)
    torch.testing.assert_close(one.T.cov(), covariance.detach(), rtol=0.05, atol=0.05 * covariance.abs().max().item())
    mixed = prior.sample(n, component=torch.arange(n, device=DEVICE) % K, seed=3)
    assert (mixed[1::K].mean(0) - prior.means[1]).abs().max() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_full_covariances_in_16_bits_are_not_rounded_between(dtype):
    torch.manual_seed(0)
    prior = fastkl.priors.GaussianMixture(2, 8, "full").to(DEVICE)
    with torch.no_grad():
        prior.log_diagonal.normal_().mul_(0.5)
        prior.lower.normal_().mul_(0.1)
    prior.to(dtype)
    z = torch.randn(5, 8, device=DEVICE).to(dtype)
    exact = torch.diag_embed(prior.log_diagonal.double().exp())
    rows, columns = torch.tril_indices(8, 8, -1)
    exact[:, rows, columns] = prior.lower.double()
    components = MultivariateNormal(prior.means.double(), scale_tril=exact, validate_args=False)
    truth = MixtureSameFamily(Categorical(logits=prior.logits.double()), components).log_prob(z.double())
    torch.testing.assert_close(prior.log_prob(z).double(), truth, rtol=1e-5, atol=1e-5)
    assert prior.sample(3).dtype == prior.sample(3, component=1).dtype == prior.rsample((2, 2)).dtype == dtype
