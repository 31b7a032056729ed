"""The importance-weighted objectives: every gradient by hand, latents, priors and surroundings of every kind."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl import objectives

from gmm_helpers import draw
from helpers import DEVICE

GRADIENTS = ("plain", "stl", "dreg")
M, L, N, D = 3, 4, 5, 2
SETTINGS = {
    "iwae": {"num_samples": M * L},
    "miwae": {"num_samples": L, "num_estimates": M},
    "ciwae": {"num_samples": M * L, "beta": 0.3},
    "piwae": {"num_samples": L, "num_estimates": M},
}
every = pytest.mark.parametrize("name", SETTINGS)
every_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def likelihood_of(x, mean=lambda z: z):
    """p(x | z) = N(mean(z), I)."""
    return lambda z: fastkl.normal_log_prob(x, mean(z), torch.zeros((), device=DEVICE), event_ndim=1)


class Toy(nn.Module):
    """An encoder, a decoder and a prior with everything at random, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(3, 2 * D), nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3))
        self.prior = fastkl.priors.LearnedNormal(D)
        nn.init.normal_(self.prior.mu), nn.init.normal_(self.prior.logvar)
        self.double().to(DEVICE)

    def loss(self, name, x, eps, gradient="plain", decoder=None, **settings):
        q = fastkl.DiagonalNormal.from_packed(self.encoder(x))
        settings = SETTINGS[name] | settings
        likelihood = likelihood_of(x, decoder or self.decoder)
        return getattr(objectives, name)(q, self.prior, likelihood, gradient=gradient, eps=eps, **settings)

    def log_w(self, x, eps, fixed):
        """ln w [M L, N] by torch.distributions, with ln q's parameters standing still or not."""
        normal = torch.distributions.Normal
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + (0.5 * logvar).exp() * eps
        q = normal(mu.detach(), (0.5 * logvar).exp().detach()) if fixed else normal(mu, (0.5 * logvar).exp())
        p = normal(self.prior.mu, (0.5 * self.prior.logvar).exp())
        return normal(self.decoder(z), 1.0).log_prob(x).sum(-1) + (p.log_prob(z) - q.log_prob(z)).sum(-1)

    def gradients(self, value, module):
        return torch.autograd.grad(value, list(module.parameters()), retain_graph=True)


def by_hand(name, log_w):
    """bound [N], and the weights of d ln w [M L, N]: for the decoder, the encoder, and it doubly reparameterised."""
    groups = log_w.view(M, L, -1)
    bound, v = torch.logsumexp(log_w, 0) - math.log(M * L), torch.softmax(log_w, 0)
    of_groups, own = torch.logsumexp(groups, 1) - math.log(L), torch.softmax(groups, 1)
    encoder, doubly = ((own**power / M).view_as(log_w) for power in (1, 2))
    if name == "iwae":
        return bound, v, v, v**2
    if name == "miwae":
        return of_groups.mean(0), encoder, encoder, doubly
    if name == "piwae":
        return bound, v, encoder, doubly
    elbo = torch.full_like(v, 0.3 / (M * L))
    return 0.3 * log_w.mean(0) + 0.7 * bound, elbo + 0.7 * v, elbo + 0.7 * v, elbo + 0.7 * v**2


@every
@every_gradient
def test_value_and_gradients(name, gradient):
    """The bound's value whatever the gradient; its weights are those of the right samples."""
    toy, x, eps = Toy(), draw(N, 3), draw(M * L, N, D, seed=1)
    log_w = toy.log_w(x, eps, fixed=gradient != "plain")
    bound, decoder, encoder, doubly = by_hand(name, log_w.detach())
    encoder = doubly if gradient == "dreg" else encoder
    loss, terms = toy.loss(name, x, eps, gradient)
    torch.testing.assert_close(loss, -bound.mean())
    torch.testing.assert_close(terms["bound"], bound.mean())
    for module, weights in ((toy.decoder, decoder), (toy.prior, decoder), (toy.encoder, encoder)):
        expected = toy.gradients(-(weights * log_w).sum(0).mean(), module)
        torch.testing.assert_close(toy.gradients(loss, module), expected, rtol=1e-10, atol=1e-12)


def table_gradient(name, table):
    """d loss / d ln p(x | z_ml) [M L, 1], and ln w of the same draws."""
    table = table.clone().requires_grad_()
    q = fastkl.DiagonalNormal(*draw(2, 1, D))
    eps = draw(M * L, 1, D, seed=1)
    z = q.rsample(num_samples=M * L, eps=eps)
    loss, _ = getattr(objectives, name)(q, None, lambda z: table, eps=eps, **SETTINGS[name])
    (gradient,) = torch.autograd.grad(loss, table)
    return (
        loss,
        gradient,
        table.detach() - q.log_prob(z) + fastkl.DiagonalNormal(*torch.zeros(2, 1, D).to(z)).log_prob(z),
    )


def test_weights_are_over_the_samples_of_an_estimate():
    """Pythae's MIWAE and PIWAE take the softmax over estimates: there, all samples of a bad one count for nothing."""
    table = torch.zeros(M, L, 1, dtype=torch.float64, device=DEVICE)
    table[0] = -50.0  # every sample of the first estimate
    _, gradient, log_w = table_gradient("miwae", table.view(M * L, 1))
    torch.testing.assert_close(gradient, -torch.softmax(log_w.view(M, L, 1), 1).view(M * L, 1) / M)
    torch.testing.assert_close(gradient[:L].sum().item(), -1 / M)
    assert torch.softmax(log_w.view(M, L, 1), 0)[0].max() < 1e-15  # the defect is real


@every
def test_the_best_sample_weighs_most_and_weights_are_constants(name):
    """PyTorch-VAE's MIWAE minimises sum_l v_l (-ln w_l) with v = softmax(-ln w), and through v as well."""
    table = torch.zeros(M * L, 1, dtype=torch.float64, device=DEVICE)
    table[2] = 8.0
    loss, gradient, log_w = table_gradient(name, table)
    assert gradient.argmin() == 2  # the largest of those that raise the likelihood
    torch.testing.assert_close(gradient, -by_hand(name, log_w)[1])
    leaf = log_w.clone().requires_grad_()
    attached = -(torch.softmax(-leaf, 0) * leaf).sum()  # the defects are real
    assert torch.autograd.grad(attached, leaf, retain_graph=True)[0][2].abs() < 0.01 * gradient[2].abs()
    assert (torch.softmax(leaf, 0) * leaf).sum() + loss > 0.5  # sum_l v_l ln w_l, which both show as the loss


@every
def test_terms(name):
    toy, x, eps = Toy(), draw(N, 3), draw(M * L, N, D, seed=1)
    _, terms = toy.loss(name, x, eps)
    log_w = toy.log_w(x, eps, fixed=False)
    torch.testing.assert_close(terms["reconstruction"] - terms["kl"], log_w.mean())
    estimates = 1 if name in ("iwae", "ciwae") else M
    groups = log_w.view(estimates, -1, N)
    torch.testing.assert_close(terms["effective_sample_size"], fastkl.effective_sample_size(groups, 1).mean())
    torch.testing.assert_close(terms["weight_entropy"], fastkl.weight_entropy(groups, 1).mean())
    assert all(term.dim() == 0 and not term.requires_grad for term in terms.values())
    if name == "piwae":
        torch.testing.assert_close(terms["encoder_bound"], fastkl.iwae(groups, 1).mean())


@every_gradient
def test_members_of_the_family_meet(gradient):
    toy, x, eps = Toy(), draw(N, 3), draw(M * L, N, D, seed=1)

    def result(name, **settings):
        loss, _ = toy.loss(name, x, eps, gradient, **settings)
        return [loss, *toy.gradients(loss, toy)]

    alone = {"num_samples": M * L, "num_estimates": 1}
    for same in (result("miwae", **alone), result("piwae", **alone), result("ciwae", beta=0)):
        torch.testing.assert_close(same, result("iwae"))
    # One sample for each estimate: the ELBO; its doubly reparameterised gradient sticks the landing.
    elbo = result("miwae", num_samples=1, num_estimates=M * L)
    for beta in (1.0, torch.ones(1, dtype=torch.float64, device=DEVICE)):
        torch.testing.assert_close(result("ciwae", beta=beta), elbo)


@every
@every_gradient
def test_latents_that_are_images_and_a_mixture(name, gradient):
    """Packed [N, 2C, H, W], a prior over C H W: as the same latents as vectors."""
    head, eps = draw(N, 4, 1, 2), draw(M * L, N, 2, 1, 2, seed=1)
    torch.manual_seed(0)
    prior = fastkl.priors.GaussianMixture(3, 4).double().to(DEVICE)
    results = []
    for flat in (False, True):
        packed = head.clone().requires_grad_()
        q = fastkl.DiagonalNormal.from_packed(packed.flatten(2).flatten(1) if flat else packed)
        noise = eps.flatten(2) if flat else eps
        event = tuple(range(2, noise.dim()))
        objective = getattr(objectives, name)
        settings = SETTINGS[name] | {"gradient": gradient, "eps": noise}
        loss, _ = objective(q, prior, lambda z, event=event: -(z - 1).square().sum(event), **settings)
        results.append([loss, *torch.autograd.grad(loss, [packed, *prior.parameters()])])
    torch.testing.assert_close(*results)


@every
@every_gradient
def test_checkpoint_and_autocast(name, gradient):
    toy, x, eps = Toy().float(), draw(N, 3).float(), draw(M * L, N, D, seed=1).float()
    loss, _ = toy.loss(name, x, eps, gradient)
    again, _ = toy.loss(name, x, eps, gradient, decoder=lambda z: checkpoint(toy.decoder, z, use_reentrant=False))
    torch.testing.assert_close([again, *toy.gradients(again, toy)], [loss, *toy.gradients(loss, toy)])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rough, terms = toy.loss(name, x, None, gradient)
    assert {value.dtype for value in (rough, *terms.values())} == {torch.float32}
    assert all(d.isfinite().all() for d in toy.gradients(rough, toy))


@pytest.mark.parametrize(("name", "gradient"), [("iwae", "dreg"), ("ciwae", "stl")])
def test_compiles_without_graph_breaks(name, gradient):
    toy, x, eps = Toy(), draw(N, 3), draw(M * L, N, D, seed=1)
    torch._dynamo.reset()
    results = [
        loss(name, x, eps, gradient).loss
        for loss in (toy.loss, torch.compile(toy.loss, backend="aot_eager", fullgraph=True))
    ]
    torch.testing.assert_close(*([value, *toy.gradients(value, toy)] for value in results))


@every
@every_gradient
def test_distributed_data_parallel(name, gradient):
    """Only the one pass back reaches parameters, whose hooks DistributedDataParallel counts."""
    toy, x, eps = Toy(), draw(N, 3), draw(M * L, N, D, seed=1)
    loss, _ = toy.loss(name, x, eps, gradient)
    expected = toy.gradients(loss, toy)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(toy.decoder)
        for _ in range(2):
            toy.zero_grad()
            toy.loss(name, x, eps, gradient, decoder=wrapped).loss.backward()
        torch.testing.assert_close([p.grad for p in toy.parameters()], list(expected))
    finally:
        torch.distributed.destroy_process_group()


@every
@every_gradient
def test_without_gradients_and_with_impossible_data(name, gradient):
    toy, x, eps = Toy(), draw(N, 3), draw(M * L, N, D, seed=1)
    with torch.no_grad():
        value = toy.loss(name, x, eps, gradient).loss
    assert not value.requires_grad
    torch.testing.assert_close(value, toy.loss(name, x, eps, gradient).loss.detach())
    for module in (toy.encoder, toy.decoder):  # frozen
        module.requires_grad_(False)
        trained = [p for p in toy.parameters() if p.requires_grad]
        assert all(d.abs().sum() > 0 for d in torch.autograd.grad(toy.loss(name, x, eps, gradient).loss, trained))
        module.requires_grad_(True)
    # One sample that cannot be: its weight is 0, its gradient too; an ELBO is -inf then.
    mu = draw(N, D).requires_grad_()
    impossible = torch.zeros(M * L, N, dtype=torch.float64, device=DEVICE)
    impossible[0] = -math.inf
    q = fastkl.DiagonalNormal(mu, torch.zeros_like(mu))
    settings = SETTINGS[name] | {"gradient": gradient, "eps": eps}
    loss, _ = getattr(objectives, name)(q, None, lambda z: impossible - z.square().sum(-1), **settings)
    assert loss.isfinite() == (name != "ciwae")
    if name == "ciwae":
        loss, _ = objectives.ciwae(q, None, lambda z: impossible - z.square().sum(-1), **settings | {"beta": 0.0})
        assert loss.isfinite()
    assert torch.autograd.grad(loss, mu)[0].isfinite().all()


@every
def test_bad_arguments_are_named(name):
    q, objective = fastkl.DiagonalNormal(draw(N, D), draw(N, D)), getattr(objectives, name)
    for changes, error, message in (
        ({"gradient": "score"}, ValueError, "gradient must be one of 'plain', 'stl', 'dreg', got 'score'"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an int"),
        ({"num_estimates": 0}, ValueError, "num_estimates must be at least 1"),
        ({"beta": 1.5}, ValueError, "beta must be from 0 to 1, got 1.5"),
        ({"beta": torch.ones(2)}, ValueError, "beta must have one value"),
        ({"eps": draw(2, N, D)}, ValueError, r"eps must be .*12, 5, 2.*got \(2, 5, 2\)"),
        ({"likelihood": lambda z: z}, ValueError, r"log_likelihood\(z\) must be one value per datum, \(12, 5\)"),
        ({"q": draw(N, D)}, TypeError, r"posterior must be a fastkl\.DiagonalNormal"),
    ):
        settings = SETTINGS[name] | changes
        if not changes.keys() <= SETTINGS[name].keys() | {"gradient", "num_samples", "eps", "likelihood", "q"}:
            continue
        posterior, likelihood = settings.pop("q", q), settings.pop("likelihood", lambda z: z.sum(-1))
        with pytest.raises(error, match=message):
            objective(posterior, None, likelihood, **settings)
