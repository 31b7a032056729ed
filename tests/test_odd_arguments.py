"""What is passed by mistake is refused by name, and NumPy's numbers are numbers, also where Python composes the ops."""

import numpy as np
import pytest
import torch

import fastkl
from fastkl import objectives, priors, remedies, schedules

from helpers import DEVICE, Package

zuko = Package("zuko")


def q():
    return fastkl.DiagonalNormal(torch.zeros(4, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE))


def likelihood(z):
    return -z.square().sum(-1)


def schedule(name="linear", **given):
    options = {"step": 3, "start": 0.5, "end": 1.0, "steps": 8} | given
    return getattr(schedules, name)(options.pop("step"), options.pop("start"), options.pop("end"), **options)


def test_the_noise_of_an_objective_has_its_samples_in_front_whatever_the_prior():
    """Without them every datum had the noise of the first."""
    eps = torch.randn(4, 3, device=DEVICE)
    for prior in (None, priors.StandardNormal(3).to(DEVICE)):
        with pytest.raises(ValueError, match=r"eps must be the noise of 1 samples, \(1, 4, 3\), got \(4, 3\)"):
            objectives.elbo(q(), prior, likelihood, eps=eps)
        objectives.elbo(q(), prior, likelihood, eps=eps[None])


CASES = {
    "step": lambda: schedule(step="3"),
    "steps": lambda: schedule("cosine", steps=None),
    "start": lambda: schedule(start="0"),
    "end": lambda: schedule("exponential", end=1j),
    "ratio": lambda: schedule("cyclical", ratio="0.5"),
    "steepness": lambda: schedule("sigmoid", steepness=None),
    "eps": lambda: objectives.elbo(q(), None, likelihood, eps=1.0),
    "num_samples": lambda: objectives.elbo(q(), None, likelihood, num_samples="2"),
    "remedy": lambda: objectives.elbo(q(), None, likelihood, remedy=2.0),
    "prior_samples": lambda: objectives.swae(q(), None, likelihood, prior_samples=100),
    "sizes": lambda: remedies.balance(torch.ones(4, 2), 3),
    "z": lambda: priors.GaussianMixture(2, 3).to(DEVICE).kl_relaxed(q(), None, 1.0),
    "gumbel": lambda: (
        priors.GaussianMixture(2, 3).to(DEVICE).kl_relaxed(q(), torch.zeros(1, 4, 3, device=DEVICE), 1.0, gumbel=0.5)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_argument_of_the_wrong_type_is_named(name):
    with pytest.raises(TypeError, match=f"^{name} must be"):
        CASES[name]()


@pytest.mark.parametrize("name", ["steps", "ratio", "steepness"])
def test_a_schedule_has_one_length(name):
    kind = {"steps": "linear", "ratio": "cyclical", "steepness": "sigmoid"}[name]
    with pytest.raises(ValueError, match=f"{name} must have one value"):
        schedule(kind, **{name: torch.ones(2)})


def test_dimensions_and_cycles_may_be_ints_of_numpy():
    x = torch.randn(4, 6, device=DEVICE)
    one = np.int64(1)
    for op in (fastkl.iwae, fastkl.effective_sample_size, fastkl.weight_entropy):
        assert torch.equal(op(x, one), op(x, 1))
    packed = fastkl.DiagonalNormal.from_packed(x, one)
    assert torch.equal(packed.kl(), fastkl.DiagonalNormal.from_packed(x, 1).kl())
    assert schedule("cyclical", cycles=np.int64(2)) == schedule("cyclical", cycles=2)
    assert schedule(step=np.float32(3)) == pytest.approx(schedule())


def test_draws_of_a_flow_by_a_seed_compile():
    prior = priors.FlowPrior(zuko.flows.NICE(2, transforms=1, hidden_features=(4,))).to(DEVICE)
    found = torch.compile(lambda: prior.sample(3, seed=1), backend="eager")()
    torch.testing.assert_close(found, prior.sample(3, seed=1))
