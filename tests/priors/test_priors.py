"""The contract of every prior as a module, and the sampled KL that they inherit."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch.distributions import Independent, Normal

import fastkl
from fastkl import priors
from fastkl.priors import GaussianMixture, Prior

from helpers import DEVICE
from prior_helpers import MAKE, D, K, every_prior, mixture, posterior


@pytest.mark.parametrize("gradient", ["plain", "stl"])
@pytest.mark.parametrize("entropy", ["closed", "sampled"])
def test_the_kl_that_every_prior_inherits_is_that_of_the_fused_op(entropy, gradient):
    prior, settings = mixture("full"), {"num_samples": 3, "entropy": entropy, "gradient": gradient, "seed": 9}
    found = []
    for kl in (GaussianMixture.kl, Prior.kl):
        q = posterior()
        values = kl(prior, q, **settings)
        inputs = (*q.tensors, *prior.parameters())
        found.append((values, *torch.autograd.grad(values.square().sum(), inputs)))
    for fused, inherited in zip(*found):
        torch.testing.assert_close(fused, inherited, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gradient", ["plain", "stl"])
def test_a_sampled_entropy_keeps_its_digits_where_means_are_large(gradient):
    prior, found = Prior(), []
    prior.log_prob = lambda z: 0.0 * z.sum(-1)
    for dtype in (torch.float32, torch.float64):
        mu, logvar = (torch.full((1, 1), n, dtype=dtype, device=DEVICE, requires_grad=True) for n in (1000.0, -6.0))
        kl = prior.kl(fastkl.DiagonalNormal(mu, logvar), num_samples=4, entropy="sampled", gradient=gradient, seed=1)
        found.append([kl.double(), *(g.double() for g in torch.autograd.grad(kl.sum(), (mu, logvar)))])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_stl_gradient_is_zero_at_the_prior():
    zuko = pytest.importorskip("zuko")
    flow = priors.FlowPrior(zuko.flows.GMM(D, components=1)).to(DEVICE)  # replace what the flow returns
    flow.flow.forward = lambda: Independent(Normal(torch.ones(D, device=DEVICE), 2.0), 1)
    leaves = [torch.full((5, D), value, device=DEVICE, requires_grad=True) for value in (1.0, math.log(4.0))]
    for gradient, vanishes in (("stl", True), ("plain", False)):
        kl = flow.kl(fastkl.DiagonalNormal(*leaves), gradient=gradient, entropy="sampled", seed=3)
        assert kl.abs().max() < 1e-5
        found = torch.autograd.grad(kl.sum(), leaves)
        assert all((g.abs().max() < 1e-5) == vanishes for g in found)


@every_prior
def test_samples_obey_seeds(make):
    prior = make().to(DEVICE)
    assert prior.sample(5, seed=1).shape == (5, D)
    assert prior.sample(0).shape == (0, D)
    torch.manual_seed(0)
    first = prior.sample(5)
    state = torch.get_rng_state()
    assert torch.equal(prior.sample(5, seed=1), prior.sample(5, seed=1))
    assert torch.equal(prior.sample(5, seed=1), prior.sample(5, seed=torch.tensor(1, device=DEVICE)))
    assert torch.equal(state, torch.get_rng_state()), "a seed of its own leaves torch's generator alone"
    assert not torch.equal(first, prior.sample(5))
    torch.manual_seed(0)
    assert torch.equal(first, prior.sample(5))
    assert not first.requires_grad


@every_prior
def test_a_step_of_training_moves_every_parameter(make):
    torch.manual_seed(1)
    prior = make().to(DEVICE)
    if isinstance(prior, priors.VampPrior):
        prior.encoder.to(DEVICE)
    if isinstance(prior, GaussianMixture):  # at its start nothing pulls at weights and triangles alike
        prior.load_state_dict({name: torch.randn(t.shape) for name, t in prior.state_dict().items()})
    parameters = list(prior.parameters())
    before = [parameter.clone() for parameter in parameters]
    q = fastkl.DiagonalNormal(torch.randn(32, D, device=DEVICE), torch.randn(32, D, device=DEVICE))
    kl = prior.kl(q, num_samples=8)
    assert kl.shape == (32,)
    if parameters:
        optimiser = torch.optim.Adam(parameters, lr=0.1)
        kl.mean().backward()
        optimiser.step()
        assert all((a != b).any() for a, b in zip(before, parameters))
        assert prior.kl(q, num_samples=200).mean() < kl.mean() + 1


@every_prior
def test_state_survives_saving_into_a_fresh_module(make, tmp_path):
    one, other = make().to(DEVICE), make().to(DEVICE)
    torch.save(one.state_dict(), tmp_path / "prior.pt")
    missing, unexpected = other.load_state_dict(torch.load(tmp_path / "prior.pt", weights_only=True))
    assert not missing
    assert not unexpected
    assert (len(one.state_dict()) == 0) == isinstance(one, priors.StandardNormal)
    if isinstance(one, priors.VampPrior):
        other.encoder.load_state_dict(one.encoder.to(DEVICE).state_dict())
    z = torch.randn(4, D, device=DEVICE)
    assert torch.equal(one.log_prob(z), other.to(DEVICE).log_prob(z))
    assert torch.equal(one.sample(3, seed=1), copy.deepcopy(other).sample(3, seed=1))


@every_prior
def test_the_shapes_of_posteriors_and_latents(make):
    """Leading dimensions, an event of two dimensions, a packed head, 16 bits, bounds, no data at all."""
    prior = make().to(DEVICE)
    if isinstance(prior, priors.VampPrior):
        prior.encoder.to(DEVICE)
    head = torch.randn(4, 2 * D, device=DEVICE)
    expected = prior.kl(fastkl.DiagonalNormal(*head.chunk(2, 1)), num_samples=2, seed=1)
    for q in (
        fastkl.DiagonalNormal.from_packed(head),
        fastkl.DiagonalNormal.from_packed(head.view(4, 2, D), event_ndim=2),
        fastkl.DiagonalNormal.from_packed(head.view(4, 2 * D, 1, 1)),
        fastkl.DiagonalNormal(*head.chunk(2, 1), bounds=(-20, 20)),
        fastkl.DiagonalNormal(head[:, :D], 0.5 * head[:, D:], scale="log_std"),
    ):
        torch.testing.assert_close(prior.kl(q, num_samples=2, seed=1), expected)
    image = fastkl.DiagonalNormal(*(half.view(4, 1, D) for half in head.chunk(2, 1)))
    torch.testing.assert_close(prior.kl(image, num_samples=2, seed=1), expected)
    steps = fastkl.DiagonalNormal(*(half.view(2, 2, D) for half in head.chunk(2, 1)), event_ndim=1)
    torch.testing.assert_close(prior.kl(steps, num_samples=2, seed=1).flatten(), expected)
    z = torch.randn(2, 3, D, device=DEVICE)
    torch.testing.assert_close(prior.log_prob(z)[1, 2], prior.log_prob(z[1, 2]))
    half = prior.kl(fastkl.DiagonalNormal(*head.bfloat16().chunk(2, 1)), num_samples=2, seed=1)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.1)
    assert prior.kl(fastkl.DiagonalNormal(*head[:0].chunk(2, 1))).shape == (0,)


Q = posterior(2)
BAD = {
    "dim": (lambda: priors.StandardNormal(0), ValueError, "dim must be at least 1"),
    "components": (lambda: GaussianMixture(2.0, 3), TypeError, "components must be an int"),
    "covariance": (
        lambda: GaussianMixture(2, 3, "diagonal"),
        ValueError,
        "covariance must be one of 'diag'.*'diagonal'",
    ),
    "no posterior": (
        lambda: mixture().kl(torch.zeros(2, D)),
        TypeError,
        "q must be a fastkl.Diag.* got Tensor",
    ),
    "posterior dim": (lambda: mixture(dim=2).kl(Q), ValueError, r"q has events of shape \(3,\), but the prior has 2"),
    "standard dim": (lambda: priors.StandardNormal(2).kl(Q), ValueError, "but the prior has 2 dimensions"),
    "latent dim": (lambda: priors.StandardNormal(2).log_prob(Q.mean), ValueError, r"z must be \(\*batch, 2\)"),
    "method": (lambda: mixture().kl(Q, method="closed"), ValueError, "GaussianMixture.kl must be one of 'mc', 'upper'"),
    "flow method": (lambda: MAKE["flow"]().kl(Q, method="upper"), ValueError, "FlowPrior.kl must be one of 'mc', got"),
    "flow dim": (lambda: MAKE["flow"]().log_prob(Q.mean[:, :2]), ValueError, r"z must be \(\*batch, 3\), the flow"),
    "entropy": (lambda: priors.StandardNormal(D).kl(Q, entropy="open"), ValueError, "entropy.*'closed', 'sampled'"),
    "gradient": (lambda: MAKE["flow"]().kl(Q, gradient="dreg"), ValueError, "gradient.*'plain', 'stl'"),
    "samples": (lambda: MAKE["flow"]().kl(Q, num_samples=0), ValueError, "num_samples must be at least 1"),
    "n": (lambda: mixture().sample(-1), ValueError, "n must be at least 0"),
    "component": (lambda: mixture().sample(3, component=K), ValueError, "component must be one int from 0 to 3"),
    "component bool": (
        lambda: mixture().sample(4, component=True),
        ValueError,
        "one int from 0 to 3, or 4 .* got True",
    ),
    "component type": (lambda: mixture().sample(3, component=0.5), ValueError, "component must be one int"),
    "component count": (lambda: mixture().sample(3, component=torch.zeros(2).long()), ValueError, "or 3 of them"),
    "seed": (lambda: mixture().sample(3, seed=0.5), TypeError, "seed must be an int"),
    "no data": (lambda: mixture().usage(Q.mean[:0]), ValueError, "z must hold at least one datum"),
    "flow": (lambda: priors.FlowPrior(lambda: None), TypeError, "flow must be a torch.nn.Module"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_works_without_zuko():
    script = """
import sys
sys.modules["zuko"] = None  # importing it raises
import torch, fastkl
prior = fastkl.priors.GaussianMixture(3, 2)
prior.fit(torch.randn(20, 2))
prior.kl(fastkl.DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2))).sum().backward()
fastkl.priors.FlowPrior(torch.nn.Identity())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_seeded_flow_leaves_every_generator_as_it_was(monkeypatch):
    """torch.manual_seed seeds all CUDA devices, whatever the flow is on."""

    class Flow(torch.nn.Module):
        def forward(self):
            return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1)

    states = {0: "first", 1: "second"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: states.update({0: seed, 1: seed}))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    before = torch.get_rng_state()
    assert torch.equal(*(priors.FlowPrior(Flow()).sample(4, seed=7) for _ in range(2)))
    assert states == {0: "first", 1: "second"}
    assert torch.equal(torch.get_rng_state(), before)


@every_prior
def test_draws_of_a_shape_are_draws(make):
    torch.manual_seed(0)
    prior = make().to(DEVICE)
    for draw in (prior.sample, prior.rsample):
        flat = draw(12, seed=3)
        torch.testing.assert_close(draw((3, 4), seed=3), flat.view(3, 4, D))
        assert draw(torch.Size([2, 0, 3])).shape == (2, 0, 3, D)
        assert draw(()).shape == (D,)
        for bad, message in (((3, -1), "n must be at least 0, got -1"), ((2.0,), "n must be an int, got float")):
            with pytest.raises((TypeError, ValueError), match=message):
                draw(bad)


def test_draws_of_a_shape_have_components_of_that_shape():
    prior, component = mixture(), torch.arange(12, device=DEVICE).view(3, 4) % K
    torch.testing.assert_close(
        prior.sample((3, 4), component=component, seed=3),
        prior.sample(12, component=component.flatten(), seed=3).view(3, 4, D),
    )
    assert prior.sample((3, 4), component=1).shape == (3, 4, D)
