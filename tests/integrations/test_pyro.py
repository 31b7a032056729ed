"""Pyro with fastkl inside, against itself in float64."""

import pytest
import torch

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO  # noqa: E402
from torch.distributions import kl as torch_kl  # noqa: E402
from torch.distributions import kl_divergence  # noqa: E402

from fastkl.integrations import distributions  # noqa: E402
from fastkl.integrations import pyro as integration  # noqa: E402
from fastkl.integrations._switch import UnsupportedVersion  # noqa: E402

N, D, K = 9, 4, 6


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    monkeypatch.setattr(distributions, "SMALL_MIXTURE", 0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def standard(n: int):
    return dist.Normal(torch.zeros(D), torch.ones(D)).expand([n, D]).to_event(1)


def mixture(n: int):
    means = pyro.param("means", lambda: torch.linspace(-2, 2, K * D).view(K, D))
    components = dist.Normal(means, torch.tensor(0.7)).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=torch.linspace(0, 1, K)), components)


def gradients(prior, loss) -> list[torch.Tensor]:
    """The loss of one step and its gradients, of the same noise each time."""
    x = torch.linspace(-1, 1, N * D).view(N, D)

    def model():
        with pyro.plate("data", N):
            z = pyro.sample("z", prior(N))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide():
        loc, scale = pyro.param("loc", 0.5 * x), pyro.param("scale", 1 + 0.1 * x, constraint=dist.constraints.positive)
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    value = loss.loss_and_grads(model, guide)
    store = pyro.get_param_store()
    return [torch.tensor(value), *(store[name].unconstrained().grad.clone() for name in sorted(store))]


@pytest.mark.parametrize("loss", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("prior", [standard, mixture])
def test_a_step_is_what_it_was(loss, prior):
    expected = gradients(prior, loss())
    with integration.enable():
        actual = gradients(prior, loss())
    for found, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


def test_what_pyro_registers_stays_below():
    before = dict(torch_kl._KL_REGISTRY)
    point = dist.Delta(torch.ones(D)).to_event(1)
    p, full = standard(1), dist.MultivariateNormal(torch.zeros(D), torch.eye(D))
    stock = [kl_divergence(point, q) for q in (p, full)]
    with integration.enable():
        for q, value in zip((p, full), stock):
            torch.testing.assert_close(kl_divergence(point, q), value)
        torch.testing.assert_close(kl_divergence(p, full), torch.zeros(1), atol=1e-12, rtol=0)
    assert dict(torch_kl._KL_REGISTRY) == before


@pytest.mark.parametrize("first", ["enabled first", "enabled last"])
def test_distributions_and_pyro_are_disabled_in_any_order(first):
    """Both replace the same functions."""
    before, log_prob = dict(torch_kl._KL_REGISTRY), dist.MixtureSameFamily.log_prob
    one, other = (distributions, integration) if first == "enabled first" else (integration, distributions)
    distributions.enable()
    integration.enable()
    one.disable()
    assert torch_kl._KL_REGISTRY[torch.distributions.Normal, torch.distributions.Normal] is distributions.kl_of_normals
    assert dist.MixtureSameFamily.log_prob is not log_prob
    other.disable()
    assert dict(torch_kl._KL_REGISTRY) == before
    assert dist.MixtureSameFamily.log_prob is log_prob


def test_other_families_stay_pyros():
    p, q = (dist.Gamma(torch.full((3, D), rate), 1.0).to_event(2) for rate in (1.0, 2.0))
    stock = kl_divergence(p, q)
    with integration.enable():
        assert torch.equal(kl_divergence(p, q), stock)


def test_a_mixture_with_a_density_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(dist.MixtureSameFamily, "log_prob", lambda self, value: None)
    with pytest.raises(UnsupportedVersion, match="tested with 1"):
        integration.enable()
