"""kl(method="relaxed") of mixture priors where it is easily wrong: no weight, far away, other shapes, large."""

import math

import pytest
import torch

import fastkl
from fastkl import priors
from fastkl.priors import GaussianMixture

from helpers import DEVICE, peak_bytes
from prior_helpers import MAKE, D, K, choice_noise, mixture, posterior


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_a_component_without_weight_is_as_good_as_none(tau):
    prior, q, gumbel = mixture(), posterior(), choice_noise(2, 6, K)
    with torch.no_grad():
        prior.logits[1], prior.means[1], prior.logvars[1] = -math.inf, 50.0, 9.0
    rest = GaussianMixture(K - 1, D).double().to(DEVICE)
    keep = [0, 2, 3]
    rest.load_state_dict({name: value[keep] for name, value in prior.state_dict().items()})
    z = q.rsample(num_samples=2, seed=4)
    inputs = q.tensors
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
NOISE = choice_noise(1, 2, K)
BAD = {
    "full": (lambda: mixture("full").kl(Q, method="relaxed"), ValueError, "covariance must be .*'tied', got 'full'"),
    "tau": (lambda: mixture().kl(Q, method="relaxed", tau=-1.0), ValueError, "tau must be a finite number"),
    "tau, own noise": (lambda: mixture().kl_relaxed(Q, Z, -1.0, gumbel=NOISE), ValueError, "tau must be"),
    "z": (lambda: mixture().kl_relaxed(Q, Z[0], 1.0), ValueError, r"z must be \(L, 2, 3\).*got \(2, 3\)"),
    "gumbel": (lambda: mixture().kl_relaxed(Q, Z, 1.0, gumbel=NOISE[0]), ValueError, r"gumbel must be \(1, 2, 4\)"),
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
