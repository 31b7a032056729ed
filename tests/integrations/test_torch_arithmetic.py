"""What torch's arithmetic takes, torch.distributions takes with fastkl inside: small tensors and large ones."""

import pytest
import torch
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    kl_divergence,
    register_kl,
)

from fastkl import DiagonalNormal
from fastkl.integrations import distributions
from fastkl.ops import _torch

N = 6


@pytest.fixture(autouse=True, params=["by ops", "by torch"])
def way(request, monkeypatch):
    for name in ("SMALL_MIXTURE", "SMALL_NORMAL"):
        monkeypatch.setattr(distributions, name, 0 if request.param == "by ops" else 10**9)


def compare(function) -> None:
    stock = function()
    with distributions.enable():
        torch.testing.assert_close(function(), stock)


def test_integers_are_floats():
    whole, one = torch.arange(N), torch.ones(N)
    for loc, scale in ((whole, one), (whole, one.long()), (whole.int(), 2 * one.double()), (whole.short(), one)):
        p, q = Normal(loc, scale, validate_args=False), Normal(0 * one, one)
        compare(lambda p=p, q=q: kl_divergence(p, q))
        compare(lambda p=p, q=q: kl_divergence(q, p))
        compare(lambda p=p, q=q: kl_divergence(Independent(p, 1, False), Independent(q, 1)))
    components = Independent(Normal(whole.view(3, 2), 2.0, validate_args=False), 1)
    for x in (torch.ones(4, 2), torch.ones(4, 2).long()):
        compare(lambda x=x: MixtureSameFamily(Categorical(torch.ones(3)), components).log_prob(x))


def test_one_number_on_the_cpu_goes_beside_any_device():
    """Normal(0.0, 1.0) is on the CPU, and torch takes it beside tensors of a GPU."""
    mu, one = torch.zeros(N, device="meta"), Normal(torch.tensor(0.0, requires_grad=True), 1.0)
    other = Normal(mu, mu, validate_args=False)
    with distributions.enable():
        for p, q in ((other, one), (one, other), (Independent(other, 0), Independent(one, 0))):
            kl = kl_divergence(p, q)
            assert (kl.device.type, kl.shape) == ("meta", (N,))
        assert one.loc.device.type == "cpu"


def test_a_posterior_of_fastkl_beside_one_number():
    q = DiagonalNormal(torch.zeros(2, N, device="meta"), torch.zeros(2, N, device="meta"))
    for p in (Normal(0.0, 1.0), Normal(torch.tensor(0), torch.tensor(2.0))):
        assert kl_divergence(q, p).device.type == kl_divergence(p, q).device.type == "meta"
    here = DiagonalNormal(torch.zeros(2, N), torch.zeros(2, N))
    whole = Normal(torch.tensor(0), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(kl_divergence(here, whole), torch.zeros(2))
    assert kl_divergence(here, Normal(torch.zeros(N).double(), 1.0)).dtype == torch.float64


def test_one_number_in_float64_leaves_the_dtype():
    for kind, other in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        p = Normal(torch.linspace(-1, 1, N, dtype=kind), torch.ones(N, dtype=kind))
        q = Normal(torch.tensor(0.5, dtype=other), torch.tensor(2.0, dtype=other))
        compare(lambda p=p, q=q: kl_divergence(p, q))
        compare(lambda p=p, q=q: kl_divergence(q, p))
        compare(lambda q=q: kl_divergence(q, q))


def test_16_bits_anywhere_are_no_reason_to_round():
    half = torch.bfloat16
    wide, narrow = Normal(torch.zeros(()), 1.01), Normal(torch.full((N,), 0.05, dtype=half), torch.ones(N, dtype=half))
    exact = kl_divergence(Normal(wide.loc.double(), wide.scale.double()), Normal(narrow.loc.double(), 1.0))
    weights, means = torch.tensor([0.2, 0.3, 0.5]), torch.linspace(-1, 1, 3)[:, None]
    at, std = torch.linspace(-2, 2, 5)[:, None], torch.full((3, 1), 0.7)

    def log_prob(logits, means, stds):
        return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, stds), 1)).log_prob(at)

    with distributions.enable():
        torch.testing.assert_close(kl_divergence(wide, narrow).double(), exact, rtol=1e-5, atol=0)
        for kinds in ((half, None, None), (None, half, None), (None, None, half), (half, half, half)):
            given = [t.to(kind) if kind else t for t, kind in zip((weights.log(), means, std), kinds)]
            normal = Normal(given[1].double(), given[2].double())
            density = normal.log_prob(at[:, None].double())[..., 0]
            true = torch.logsumexp(density + torch.log_softmax(given[0].double(), 0), -1)
            torch.testing.assert_close(log_prob(*given).double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Ambiguous kl_divergence")
def test_a_kl_registered_for_a_subclass_and_all_others_is_kept():
    class Mine(Normal):
        pass

    at, one = torch.zeros(N), torch.ones(N)
    register_kl(Mine, Distribution)(lambda p, q: torch.full_like(p.loc, 7.0))
    register_kl(Normal, Mine)(lambda p, q: torch.full_like(p.loc, 5.0))
    try:
        first, second = (Independent(kind(at, one), 1) for kind in (Mine, Normal))
        with distributions.enable():
            assert kl_divergence(first, second) == 7 * N
            assert kl_divergence(second, first) == 5 * N
            assert kl_divergence(second, second) == 0
    finally:
        _torch.forget_kl((Mine, Distribution))
        _torch.forget_kl((Normal, Mine))
