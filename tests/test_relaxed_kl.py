"""kl(method="relaxed") of mixture priors: its definition, its limit, its gradients, and what is never made."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, kl_divergence

import fastkl
from fastkl import priors, reference
from fastkl.mixtures import SECOND_KEY
from fastkl.priors import GaussianMixture
from fastkl.priors._relaxed import kl_relaxed

from helpers import DEVICE, peak_bytes
from prior_helpers import MAKE, D, K, mixture, posterior

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


def noise(*shape) -> torch.Tensor:
    return reference.gumbel_noise(torch.tensor(3, device=DEVICE), shape).double()


def repeated(q, count: int) -> fastkl.DiagonalNormal:
    return fastkl.DiagonalNormal(*(t.detach().expand(count, *t.shape) for t in (q.mean, q.logvar)), event_ndim=1)


def assert_mean_is(values, expected, errors: float = 5.0) -> None:
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() < errors * error).all()
    assert (error < 0.05 * (1 + expected)).all(), "a test that can fail"


@smooth
@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_it_is_the_formula_with_all_its_gradients(covariance, tau):
    prior, q, gumbel = overlapping(covariance), posterior(), noise(2, 6, K)
    z = q.rsample(num_samples=2, seed=4)
    y = torch.softmax((prior.responsibilities(z) + gumbel) / tau, -1)
    sigma = y @ (0.5 * prior.logvars).exp().expand(prior.means.shape)
    relaxed = normal(y @ prior.means, 2 * sigma.log())
    expected = (kl_divergence(normal(q.mean, q.logvar), relaxed) + choice_kl(prior, z)).mean(0)
    inputs = (q._mu, q._parameter, *prior.parameters())
    wanted = torch.autograd.grad(expected.square().sum(), inputs, retain_graph=True)
    for temperature in (tau, torch.tensor(tau, dtype=torch.float64, device=DEVICE)):
        actual = prior.kl_relaxed(q, z, temperature, gumbel=gumbel)
        torch.testing.assert_close(actual, expected)
        found = torch.autograd.grad(actual.square().sum(), inputs, retain_graph=True)
        torch.testing.assert_close(found, wanted)


@smooth
def test_cold_it_is_the_kl_to_the_chosen_component(covariance):
    prior, q, gumbel = overlapping(covariance), posterior(), noise(2, 6, K)
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


def test_the_draws_are_those_of_monte_carlo_and_the_choice_has_noise_of_its_own():
    prior, q = mixture(), posterior()
    z = fastkl.rsample_normal(q.mean, q.logvar, num_samples=3, seed=8)
    monte_carlo = -reference.normal_entropy(q.logvar) - prior.log_prob(z).mean(0)
    torch.testing.assert_close(prior.kl(q, num_samples=3, seed=8), monte_carlo)
    actual = prior.kl(q, method="relaxed", num_samples=3, seed=8, tau=0.7)
    choice = torch.tensor(8 ^ SECOND_KEY, device=DEVICE)
    assert torch.equal(actual, prior.kl_relaxed(q, z, 0.7, seed=choice))
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

    assert gradcheck(loss, (q._mu, q._parameter, prior.logits, prior.means, prior.logvars, tau))


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_a_component_without_weight_is_as_good_as_none(tau):
    prior, q, gumbel = mixture(), posterior(), noise(2, 6, K)
    with torch.no_grad():
        prior.logits[1], prior.means[1], prior.logvars[1] = -math.inf, 50.0, 9.0
    rest = GaussianMixture(K - 1, D).double().to(DEVICE)
    keep = [0, 2, 3]
    rest.load_state_dict({name: value[keep] for name, value in prior.state_dict().items()})
    z = q.rsample(num_samples=2, seed=4)
    inputs = (q._mu, q._parameter)
    found = []
    for one, g in ((prior, gumbel), (rest, gumbel[..., keep])):
        kl = one.kl_relaxed(q, z, tau, gumbel=g)
        found.append([kl, *torch.autograd.grad(kl.sum(), (*inputs, *one.parameters()), retain_graph=True)])
    for with_it, without in zip(*found):
        if len(with_it) == K:
            assert (with_it[1] == 0).all()
            with_it = with_it[keep]
        torch.testing.assert_close(with_it, without)
    assert prior.kl(q, method="relaxed", tau=tau).isfinite().all()


def test_far_from_every_component_it_stays_finite():
    prior = GaussianMixture(3, 2).to(DEVICE)
    with torch.no_grad():
        prior.means.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e19, 0.0]]))
    leaves = [torch.full((2, 2), value, device=DEVICE, requires_grad=True) for value in (300.0, -9.0)]
    kl = prior.kl(fastkl.DiagonalNormal(*leaves), method="relaxed", tau=0.1)
    kl.sum().backward()
    assert kl.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in (*leaves, *prior.parameters()))


def test_shapes_dtypes_and_autocast():
    prior, head = mixture().float(), torch.randn(4, 2 * D, device=DEVICE)
    settings = {"method": "relaxed", "num_samples": 2, "seed": 1, "tau": 0.5}
    expected = prior.kl(fastkl.DiagonalNormal(*head.chunk(2, 1)), **settings)
    for q in (
        fastkl.DiagonalNormal.from_packed(head),
        fastkl.DiagonalNormal.from_packed(head.view(4, 2 * D, 1, 1)),
        fastkl.DiagonalNormal(head[:, :D], 0.5 * head[:, D:], scale="log_std"),
    ):
        torch.testing.assert_close(prior.kl(q, **settings), expected)
    steps = fastkl.DiagonalNormal(*(half.view(2, 2, D) for half in head.chunk(2, 1)), event_ndim=1)
    torch.testing.assert_close(prior.kl(steps, **settings).flatten(), expected)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(prior.kl(fastkl.DiagonalNormal.from_packed(head), **settings), expected)
    half = prior.kl(fastkl.DiagonalNormal.from_packed(head.bfloat16()), **settings)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)
    assert prior.kl(fastkl.DiagonalNormal(*head[:0].chunk(2, 1)), **settings).shape == (0,)


@pytest.mark.parametrize("name", ["standard", "normal", "vamp"])
def test_other_priors(name):
    """A single Gaussian leaves no choice; VampPrior is a mixture as any other."""
    prior, q = MAKE[name]().to(DEVICE), fastkl.DiagonalNormal(*torch.randn(2, 5, D, device=DEVICE))
    if name == "vamp":
        prior.encoder.to(DEVICE)
        prior.kl(q, method="relaxed", tau=0.5).sum().backward()
        assert (prior.pseudo_inputs.grad != 0).any()
    else:
        assert torch.equal(prior.kl(q, method="relaxed", tau=0.5), prior.kl(q))


def test_nothing_of_data_by_components_by_dimensions_is_made():
    n, k, d = 1024, 512, 128
    prior = GaussianMixture(k, d).to(DEVICE)
    leaves = [torch.randn(n, d, device=DEVICE, requires_grad=True) for _ in range(2)]
    peak = peak_bytes(lambda: prior.kl(fastkl.DiagonalNormal(*leaves), method="relaxed", tau=0.5).sum().backward())
    assert peak < 4 * n * k * d / 3


def test_annealing_recompiles_nothing():
    prior, q = mixture(), posterior()
    compiled = torch.compile(
        lambda mu, logvar, tau: prior.kl(fastkl.DiagonalNormal(mu, logvar), method="relaxed", seed=2, tau=tau),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for stance, tau in (("default", 1.0), ("fail_on_recompile", 0.7), ("fail_on_recompile", 0.1)):
        tau = torch.tensor(tau, dtype=torch.float64, device=DEVICE)
        with torch.compiler.set_stance(stance):
            actual = compiled(q.mean, q.logvar, tau)
        torch.testing.assert_close(actual, prior.kl(q, method="relaxed", seed=2, tau=tau))


Q, Z = posterior(2), torch.zeros(1, 2, D, dtype=torch.float64, device=DEVICE)
BAD = {
    "full": (lambda: mixture("full").kl(Q, method="relaxed"), ValueError, "covariance must be .*'tied', got 'full'"),
    "tau": (lambda: mixture().kl(Q, method="relaxed", tau=-1.0), ValueError, "tau must be a finite number"),
    "tau, own noise": (lambda: mixture().kl_relaxed(Q, Z, -1.0, gumbel=noise(1, 2, K)), ValueError, "tau must be"),
    "z": (lambda: mixture().kl_relaxed(Q, Z[0], 1.0), ValueError, r"z must be \(L, 2, 3\).*got \(2, 3\)"),
    "gumbel": (lambda: mixture().kl_relaxed(Q, Z, 1.0, gumbel=noise(2, K)), ValueError, r"gumbel must be \(1, 2, 4\)"),
    "samples": (lambda: mixture().kl(Q, method="relaxed", num_samples=0), ValueError, "num_samples must be at least 1"),
    "flow": (lambda: MAKE["flow"]().kl(Q, method="relaxed"), ValueError, "FlowPrior.kl must be one of 'mc', got 'rel"),
    "mixture dim": (lambda: priors.VampPrior(torch.rand(4, 5), torch.nn.Linear(5, 4)).kl(Q, method="relaxed"),
                    ValueError, r"q has events of shape \(3,\), but the prior has 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
