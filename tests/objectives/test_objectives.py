"""Objectives: their values, their gradients in each part of the model, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import distributions

import fastkl
from fastkl import objectives, priors
from fastkl.priors import GaussianMixture

from helpers import DEVICE
from prior_helpers import COVARIANCES, MAKE, D, K, mixture, posterior

N = 6
WEIGHT = torch.linspace(-1, 1, D, dtype=torch.float64, device=DEVICE)


def log_likelihood(z):
    return -0.5 * (z - WEIGHT).square().sum(-1)


def discriminator():
    torch.manual_seed(2)
    return objectives.Discriminator(D, hidden=(8,)).double().to(DEVICE)


def aae(*problem, **settings):
    return objectives.aae(*problem, discriminator(), **settings)[0]


def noise(samples=1):
    torch.manual_seed(4)
    return torch.randn(samples, N, D, dtype=torch.float64).to(DEVICE)


def from_prior():
    torch.manual_seed(8)
    return torch.randn(N, D, dtype=torch.float64).to(DEVICE)


ALL = {
    "elbo": objectives.elbo,
    "beta_vae": objectives.beta_vae,
    "capacity": lambda *problem, **settings: objectives.beta_vae(*problem, capacity=1.5, **settings),
    "iwae": lambda *problem, **settings: objectives.iwae(*problem, num_samples=1, **settings),
    "wae_mmd": objectives.wae_mmd,
    "info_vae": objectives.info_vae,
    "swae": lambda *problem, **settings: objectives.swae(*problem, seed=3, **settings),
    "sinkhorn_ae": objectives.sinkhorn_ae,
    "aae": aae,
    "beta_tc_vae": lambda *problem, **settings: objectives.beta_tc_vae(*problem, dataset_size=100, **settings),
    "vade": objectives.vade,
}
MATCHING = ("wae_mmd", "info_vae", "swae", "sinkhorn_ae", "aae")


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("name", ALL)
def test_every_combination_that_makes_sense_has_gradients(name, make):
    prior = make().double().to(DEVICE)
    q = posterior()
    if name == "beta_tc_vae" and not isinstance(prior, priors.StandardNormal):
        with pytest.raises(TypeError, match="prior must be None or StandardNormal"):
            ALL[name](q, prior, log_likelihood)
        return
    if name == "vade" and not isinstance(prior, priors.mixture.MixturePrior):
        with pytest.raises(TypeError, match="prior must be a mixture"):
            ALL[name](q, prior, log_likelihood)
        return
    if isinstance(prior, priors.VampPrior):
        prior.encoder.double().to(DEVICE)
    loss, terms = ALL[name](q, prior, log_likelihood)
    assert loss.shape == ()
    assert {"reconstruction", "kl"} < set(terms)
    assert all(term.shape == () and not term.requires_grad and term.isfinite() for term in terms.values())
    for gradient in torch.autograd.grad(loss, (*q.tensors, *prior.parameters())):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_no_prior_is_the_standard_normal():
    given = {"eps": noise()}
    for name, objective in ALL.items():
        if name == "vade":
            continue
        more = {"prior_samples": from_prior()} if name in MATCHING else {}
        results = []
        for prior in (None, priors.StandardNormal(D).double().to(DEVICE)):
            q = posterior()
            loss, terms = objective(q, prior, log_likelihood, **given, **more)
            results.append([loss, terms["kl"], *torch.autograd.grad(loss, q.tensors)])
        torch.testing.assert_close(*results, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("samples", [1, 3])
def test_sample_kl_is_the_estimate_with_that_noise(samples):
    generator = torch.Generator().manual_seed(samples)
    head = torch.randn(6, 8, generator=generator).double().requires_grad_()
    eps = torch.randn(samples, 6, 4, generator=generator).double()
    prior = GaussianMixture(5, 4).double()
    q = fastkl.DiagonalNormal.from_packed(head)
    z, kl = objectives.sample_kl(q, prior, num_samples=samples, eps=eps)
    normal = distributions.Normal(*(part for part in (head[:, :4], (head[:, 4:] / 2).exp())))
    draws = normal.mean + normal.stddev * eps
    components = distributions.Normal(prior.means, (prior.logvars / 2).exp())
    components = distributions.Independent(components, 1)
    density = distributions.MixtureSameFamily(distributions.Categorical(logits=prior.logits), components)
    expected = -normal.entropy().sum(1) - density.log_prob(draws).mean(0)
    torch.testing.assert_close(z, draws[0])
    torch.testing.assert_close(kl, expected)
    gradients = [torch.autograd.grad(loss.sum(), [head, *prior.parameters()]) for loss in (kl, expected)]
    torch.testing.assert_close(*gradients)
    upper = objectives.sample_kl(q, prior, method="upper", num_samples=samples, eps=eps)[1]
    torch.testing.assert_close(upper, prior.kl(q, method="upper"))
    gumbel = fastkl.reference.gumbel_noise(torch.tensor(1), (samples, 6, 5))
    choice = {"tau": 0.5, "gumbel": gumbel}
    relaxed = objectives.sample_kl(q, prior, method="relaxed", num_samples=samples, eps=eps, **choice)[1]
    torch.testing.assert_close(relaxed, prior.kl_relaxed(q, draws, 0.5, gumbel=gumbel))
    closed = objectives.sample_kl(q, num_samples=samples, eps=eps)
    torch.testing.assert_close(closed, (draws[0], q.kl()))


def test_elbo_is_reconstruction_less_kl():
    q, prior, eps = posterior(), mixture(), noise(3)
    z = q.rsample(num_samples=3, eps=eps)
    loss, terms = objectives.elbo(q, prior, log_likelihood, num_samples=3, eps=eps, beta=0.5)
    kl = -q.entropy() - prior.log_prob(z).mean(0)
    torch.testing.assert_close(loss, (0.5 * kl - log_likelihood(z[0])).mean())
    torch.testing.assert_close(terms["elbo"], (log_likelihood(z[0]) - kl).mean())
    upper = objectives.elbo(q, prior, log_likelihood, method="upper", eps=noise())
    torch.testing.assert_close(upper.terms["kl"], prior.kl(q, method="upper").mean())


def test_beta_is_a_number_or_tensor_and_a_remedy_replaces_the_kl():
    q, eps = posterior(), noise()
    kl, reconstruction = q.kl(), log_likelihood(q.rsample(eps=eps[0]))
    number = objectives.beta_vae(q, None, log_likelihood, beta=3.0, eps=eps).loss
    tensor = objectives.beta_vae(q, None, log_likelihood, beta=torch.tensor([3.0], device=DEVICE), eps=eps).loss
    torch.testing.assert_close(number, (3 * kl - reconstruction).mean())
    torch.testing.assert_close(tensor, number, check_dtype=False)
    held = objectives.beta_vae(q, None, log_likelihood, beta=3.0, capacity=2.0, eps=eps)
    torch.testing.assert_close(held.loss, (3 * (kl - 2).abs() - reconstruction).mean())
    torch.testing.assert_close(held.terms["kl"], kl.mean())
    bits = objectives.elbo(q, None, log_likelihood, remedy=lambda q, kl: kl.clamp(min=2), eps=eps)
    torch.testing.assert_close(bits.loss, (kl.clamp(min=2) - reconstruction).mean())


def test_matching_objectives_weigh_the_distance_of_their_draws():
    q, eps, y = posterior(), noise(), from_prior()
    z = q.rsample(eps=eps[0])
    kl, reconstruction = q.kl().mean(), log_likelihood(z).mean()
    given = {"eps": eps, "prior_samples": y}
    distance = fastkl.mmd(z, y, kernel="rbf", scales=(1.0, 2.0))
    found = objectives.wae_mmd(q, None, log_likelihood, penalty=3.0, kernel="rbf", scales=(1.0, 2.0), **given)
    torch.testing.assert_close(found.loss, 3 * distance - reconstruction)
    info = objectives.info_vae(q, None, log_likelihood, alpha=0.25, penalty=3.0, **given)
    torch.testing.assert_close(info.loss, 2.25 * fastkl.mmd(z, y) + 0.75 * kl - reconstruction)
    sliced = objectives.swae(q, None, log_likelihood, penalty=3.0, num_projections=7, p=1, seed=1, **given)
    torch.testing.assert_close(sliced.loss, 3 * fastkl.sliced_wasserstein(z, y, 7, p=1, seed=1) - reconstruction)
    sinkhorn = objectives.sinkhorn_ae(q, None, log_likelihood, penalty=3.0, blur=0.7, **given)
    torch.testing.assert_close(sinkhorn.loss, 3 * fastkl.sinkhorn_divergence(z, y, 0.7) - reconstruction)
    for loss in (found, sliced, sinkhorn):
        torch.testing.assert_close(loss.terms["kl"], kl)


def test_beta_tc_vae_weighs_the_three_parts():
    q, eps = posterior(), noise()
    z = q.rsample(eps=eps[0])
    information, correlation, dimensions = fastkl.total_correlation(z, q.mean, q.logvar, 100)
    weights = {"alpha": 2.0, "beta": 5.0, "gamma": 3.0}
    loss, terms = objectives.beta_tc_vae(q, None, log_likelihood, dataset_size=100, eps=eps, **weights)
    expected = (2 * information + 5 * correlation + 3 * dimensions - log_likelihood(z)).mean()
    torch.testing.assert_close(loss, expected)
    one = objectives.beta_tc_vae(q, None, log_likelihood, dataset_size=100, eps=eps, beta=1.0)
    sampled = (q.log_prob(z) - log_likelihood(z)).mean()
    standard = distributions.Normal(0, 1).log_prob(z).sum(-1).mean()
    torch.testing.assert_close(one.loss, sampled - standard, msg="with equal weights it is the sampled ELBO")
    torch.testing.assert_close(terms["kl"], (information + correlation + dimensions).mean())


def direct_vade(q, prior, z):
    """(sum_k r_k KL(q || N_k), KL(r || pi)) of one z per datum, by torch.distributions."""
    logits, means, scale = prior.mixture().logits, prior.means, prior.scale_tril
    components = distributions.MultivariateNormal(means, scale_tril=scale)
    log_pi = torch.log_softmax(logits, -1)
    log_r = torch.log_softmax(log_pi + components.log_prob(z.unsqueeze(-2)), -1)
    own = distributions.MultivariateNormal(q.mean.unsqueeze(1), scale_tril=torch.diag_embed(q.std).unsqueeze(1))
    kl = distributions.kl_divergence(own, components.expand((len(z), len(means))))
    return (log_r.exp() * kl).sum(-1), (log_r.exp() * (log_r - log_pi)).sum(-1)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_vade_is_its_formula(covariance):
    prior, q, eps = mixture(covariance), posterior(), noise(2)
    z = q.rsample(num_samples=2, eps=eps)
    parts = [direct_vade(q, prior, each) for each in z]
    kl, choice = (torch.stack(part).mean() for part in zip(*parts))
    loss, terms = objectives.vade(q, prior, log_likelihood, num_samples=2, eps=eps, beta=0.5)
    torch.testing.assert_close(terms["kl"], kl + choice)
    torch.testing.assert_close(terms["kl_components"], choice)
    torch.testing.assert_close(terms["elbo"], log_likelihood(z).mean() - kl - choice)
    expected = 0.5 * (kl + choice) - log_likelihood(z).mean()
    torch.testing.assert_close(loss, expected)
    leaves = [*q.tensors, *prior.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


def test_vade_survives_components_without_weight():
    prior, q = mixture(), posterior()
    with torch.no_grad():
        prior.logits[1] = float("-inf")
    loss, terms = objectives.vade(q, prior, log_likelihood, eps=noise())
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (*q.tensors, *prior.parameters())))
    fewer = GaussianMixture(K - 1, D).double().to(DEVICE)
    kept = [0, *range(2, K)]
    with torch.no_grad():
        for mine, theirs in zip(fewer.parameters(), prior.parameters()):
            mine.copy_(theirs[kept])
    torch.testing.assert_close(objectives.vade(q, fewer, log_likelihood, eps=noise()).terms, terms)


def test_published_vade_scales_by_dimension_and_adds_a_floor():
    """The published code sums ln pi_k over the dimensions and adds 1e-10 to p(z, k), so far from every component all
    responsibilities are equal. fastkl uses the mixture's."""
    prior = GaussianMixture(2, D).double().to(DEVICE)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.8, 0.2]).log())
        prior.means.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, D))
        prior.logvars.zero_()
    z = torch.tensor([[0.0] * D, [9.0] * D], dtype=torch.float64, device=DEVICE)
    log_normal = distributions.Normal(prior.means, 1.0).log_prob(z.unsqueeze(1))  # [2, K, D]
    pi = torch.softmax(prior.logits, -1).detach()
    theirs = (pi.log().unsqueeze(-1) + log_normal).sum(-1).exp() + 1e-10
    theirs = theirs / theirs.sum(-1, keepdim=True)
    right = torch.softmax(pi.log() + log_normal.sum(-1), -1)
    q = fastkl.DiagonalNormal(z, torch.zeros_like(z))
    _, terms = objectives.vade(q, prior, log_likelihood, eps=torch.zeros(1, 2, D, dtype=z.dtype, device=DEVICE))
    torch.testing.assert_close(terms["kl_components"], (right * (right / pi).log()).sum(-1).mean())
    assert abs(theirs[0, 0] - 0.8) > 0.1, "the weight of 0.8, to the power of D"
    assert abs(right[0, 0] - 0.8) < 1e-6
    assert abs(theirs[1, 1] - 0.5) < 1e-3, "nothing but the floor"
    assert right[1, 1] > 0.999


def test_adversarial_losses_reach_only_their_own_players():
    q, judge, prior = posterior(), discriminator(), mixture()
    loss, own = objectives.aae(q, prior, log_likelihood, judge, eps=noise())
    players = [*q.tensors, *prior.parameters()]
    of_loss = torch.autograd.grad(loss.loss, [*players, *judge.parameters()], allow_unused=True, retain_graph=True)
    of_own = torch.autograd.grad(own, [*players, *judge.parameters()], allow_unused=True)
    assert [grad is None for grad in of_loss] == [False] * len(players) + [True] * len(list(judge.parameters()))
    assert [grad is None for grad in of_own] == [True] * len(players) + [False] * len(list(judge.parameters()))


def test_adversarial_losses_are_cross_entropies():
    q, judge, eps, y = posterior(), discriminator(), noise(), from_prior()
    z = q.rsample(eps=eps[0])
    loss, own = objectives.aae(q, None, log_likelihood, judge, penalty=2.0, eps=eps, prior_samples=y)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(N, dtype=z.dtype, device=DEVICE), torch.zeros(N, dtype=z.dtype, device=DEVICE)
    torch.testing.assert_close(own, entropy(judge(y), ones) + entropy(judge(z), zeros))
    torch.testing.assert_close(loss.loss, 2 * entropy(judge(z), ones) - log_likelihood(z).mean())
    right = torch.cat([judge(y) > 0, judge(z) < 0]).double().mean()
    torch.testing.assert_close(loss.terms["accuracy"], right)


def test_events_of_any_rank_are_one_datum():
    q = posterior(4, 6)
    folded = fastkl.DiagonalNormal(*(t.view(4, 2, 3) for t in q.tensors))
    eps = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for name, objective in ALL.items():
        if name in ("aae", "vade"):
            continue
        more = {"prior_samples": y} if name in MATCHING else {}
        flat = objective(q, None, lambda z: z.sin().sum(-1), eps=eps, **more)
        image = objective(folded, None, lambda z: z.sin().sum((-2, -1)), eps=eps.view(1, 4, 2, 3), **more)
        torch.testing.assert_close(image, flat, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ALL)
def test_what_is_refused_is_named(name):
    q, prior, objective = posterior(), mixture() if name == "vade" else None, ALL[name]

    def never(z):
        raise AssertionError("refused before the decoder runs")

    with pytest.raises(TypeError, match=r"posterior must be .* got Tensor"):
        objective(q.mean, prior, never)
    with pytest.raises(ValueError, match="posterior must have a batch dimension"):
        objective(fastkl.DiagonalNormal(torch.zeros(3), torch.zeros(3)), prior, never)
    with pytest.raises(TypeError, match="log_likelihood must be callable"):
        objective(q, prior, torch.zeros(6))
    with pytest.raises(TypeError, match=r"prior must be .* got str"):
        objective(q, "standard", never)
    with pytest.raises(ValueError, match=r"log_likelihood\(z\) must be one value per datum, \(.*6,?\), got \(.*6, 3\)"):
        objective(q, prior, lambda z: z)
    with pytest.raises(ValueError, match="eps must"):
        objective(q, prior, never, eps=torch.zeros(1, 5, D, dtype=torch.float64, device=DEVICE))
    if name in MATCHING:
        with pytest.raises(ValueError, match="penalty must be a finite number, 0 or more, got -1"):
            objective(q, prior, never, penalty=-1)
        with pytest.raises(ValueError, match="prior_samples must be draws"):
            objective(q, prior, log_likelihood, prior_samples=torch.zeros(6, 2))
    elif name != "iwae":
        with pytest.raises(ValueError, match="beta must be a finite number, 0 or more, got nan"):
            objective(q, prior, never, beta=float("nan"))


def test_terms_that_would_be_maximised_are_refused():
    for alpha, penalty in ((1.5, 1.0), (0.25, 0.5)):
        with pytest.raises(ValueError, match="alpha must be at most 1, and alpha"):
            objectives.info_vae(posterior(), None, log_likelihood, alpha=alpha, penalty=penalty)
    with pytest.raises(TypeError, match=r"discriminator must be a torch.nn.Module"):
        objectives.aae(posterior(), None, log_likelihood, lambda z: z.sum(-1))
    with pytest.raises(ValueError, match="discriminator must return one number for each of 6 draws"):
        objectives.aae(posterior(), None, log_likelihood, torch.nn.Identity())
