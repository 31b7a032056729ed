"""torch.distributions with fastkl inside, against itself in float64."""

import pytest
import torch
from torch.distributions import (
    Categorical,
    Gamma,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
    register_kl,
)
from torch.distributions import kl as torch_kl

from fastkl.integrations import distributions
from fastkl.integrations._switch import UnsupportedVersion
from fastkl.ops import _torch

SHAPES = [((), ()), ((5,), ()), ((3, 5), (5,)), ((3, 1, 5), (4, 1)), ((0, 5), (5,)), ((2, 3, 4, 5), (2, 3, 4, 5))]


@pytest.fixture(autouse=True)
def stock_again():
    before, log_prob = dict(torch_kl._KL_REGISTRY), MixtureSameFamily.log_prob
    yield
    assert dict(torch_kl._KL_REGISTRY) == before
    assert MixtureSameFamily.log_prob is log_prob


@pytest.fixture(autouse=True, params=["by ops", "by torch"])
def way(request, monkeypatch):
    """Small and large sizes go different ways."""
    for name in ("SMALL_MIXTURE", "SMALL_NORMAL"):
        monkeypatch.setattr(distributions, name, 0 if request.param == "by ops" else 10**9)


def leaves(*shapes: tuple[int, ...], dtype=torch.float64) -> list[torch.Tensor]:
    """Means and standard deviations by turns."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values = [torch.exp(0.5 * x) if place % 2 else x for place, x in enumerate(drawn)]
    return [value.to(dtype).requires_grad_() for value in values]


def compare(function, *tensors: torch.Tensor, tolerance: float = 1e-12, **options) -> None:
    """Value and gradients with and without fastkl, in float64."""

    def run() -> list[torch.Tensor]:
        value = function(*tensors)
        weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
        return [value, *torch.autograd.grad(value, tensors, weights)]

    expected = run()
    with distributions.enable(**options):
        actual = run()
    for found, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "prior_shape"), SHAPES)
def test_kl_of_normals_is_element_by_element(shape, prior_shape):
    compare(
        lambda a, b, c, d: kl_divergence(Normal(a, b), Normal(c, d)), *leaves(shape, shape, prior_shape, prior_shape)
    )


@pytest.mark.parametrize("ndim", [0, 1, 2])
def test_kl_of_independent_normals_sums_their_events(ndim):
    def kl(a, b, c, d):
        return kl_divergence(Independent(Normal(a, b), ndim), Independent(Normal(c, d), ndim))

    compare(kl, *leaves((3, 4, 5), (3, 4, 5), (4, 5), (4, 5)))
    compare(kl, *leaves((3, 4, 5), (5,), (3, 1, 5), (1,)))


def test_a_scale_that_is_only_expanded_has_its_gradient():
    def kl(a, b, c, d):
        return kl_divergence(Normal(a, b.expand(6, 5)), Normal(c, d.expand(6, 5)))

    compare(kl, *leaves((6, 5), (5,), (6, 1), ()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_is_right_where_the_dtype_is_coarse(dtype):
    mu, std = leaves((64, 8), (64, 8), dtype=dtype)
    mu, std = 0.05 * mu.detach(), 1 + 0.02 * mu.detach()
    exact = kl_divergence(Normal(mu.double(), std.double()), Normal(torch.zeros(()).double(), 1.0))
    with distributions.enable():
        value = kl_divergence(Normal(mu, std), Normal(torch.zeros_like(mu), torch.ones_like(std)))
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-9)


def test_kl_beside_a_full_covariance():
    mean, std, loc, _ = leaves((3, 4), (3, 4), (4,), (4,))
    scale_tril = torch.eye(4, dtype=torch.float64) + 0.3 * torch.ones(4, 4, dtype=torch.float64).tril(-1)
    diagonal, full = Independent(Normal(mean, std), 1), MultivariateNormal(loc, scale_tril=scale_tril)
    as_full = MultivariateNormal(mean, scale_tril=torch.diag_embed(std))
    with distributions.enable():
        torch.testing.assert_close(kl_divergence(diagonal, full), kl_divergence(as_full, full))
        torch.testing.assert_close(kl_divergence(full, diagonal), kl_divergence(full, as_full))


def test_what_fastkl_does_not_know_stays_stock():
    a, b = Independent(Laplace(torch.zeros(3), 1.0), 1), Independent(Laplace(torch.ones(3), 2.0), 1)
    c, d = Independent(Normal(torch.zeros(3), 1.0), 1), MultivariateNormal(torch.zeros(3), torch.eye(3))
    stock = kl_divergence(a, b)
    with distributions.enable():
        assert torch.equal(kl_divergence(a, b), stock)
        for p, q in ((a, d), (d, a), (c, Independent(Normal(torch.zeros(2, 3), 1.0), 2)), (c, Gamma(1.0, 1.0))):
            with pytest.raises(NotImplementedError):
                kl_divergence(p, q)


def mixture(logits, means, stds, **given):
    return MixtureSameFamily(Categorical(logits=logits, **given), Independent(Normal(means, stds), 1))


@pytest.mark.parametrize(
    ("logits", "means", "z"),
    [((6,), (6, 4), (7, 4)), ((6,), (6, 4), (2, 7, 4)), ((7, 6), (7, 6, 4), (7, 4)), ((7, 6), (7, 6, 4), (3, 7, 4)),
     ((6,), (7, 6, 4), (3, 7, 4)), ((7, 6), (7, 6, 4), (4,)), ((1, 6), (1, 6, 4), (7, 4)), ((6,), (6, 4), (4,))],
)  # fmt: skip
def test_log_prob_of_a_mixture(logits, means, z):
    weights, stds, centres, _, points = leaves(logits, means, means, (), z)
    compare(lambda w, s, m, x: mixture(w, m, s).log_prob(x), weights, stds, centres, points, tolerance=1e-10)


def test_a_subclass_keeps_its_own_density_and_its_own_kl():
    class Other(Normal):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    class Product(Independent):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    class Divergent(Normal):
        pass

    one, at = torch.ones(3), torch.ones(5, 2)
    register_kl(Divergent, Normal)(lambda p, q: torch.full_like(p.loc, 7.0))
    try:
        pair = Independent(Divergent(0 * one, one), 1), Independent(Normal(one, one), 1)
        with distributions.enable():
            assert kl_divergence(*pair) == 21
            assert kl_divergence(*reversed(pair)) == 1.5
    finally:
        _torch.forget_kl((Divergent, Normal))
    normal = Normal(torch.randn(3, 2), 1.0)
    for components in (Independent(Other(normal.loc, 1.0), 1), Product(normal, 1)):
        given = MixtureSameFamily(Categorical(one), components)
        stock = given.log_prob(at)
        with distributions.enable():
            assert torch.equal(given.log_prob(at), stock)


@pytest.mark.parametrize("x", [torch.ones(4, 2, dtype=torch.int64), torch.ones(4, 1)])
def test_points_of_integers_and_of_fewer_columns(x):
    """torch takes them, the latter unless it validates."""
    components = Independent(Normal(torch.randn(3, 2), 2.0, validate_args=False), 1, validate_args=False)
    given = MixtureSameFamily(Categorical(torch.ones(3)), components, validate_args=False)
    stock = given.log_prob(x)
    with distributions.enable():
        torch.testing.assert_close(given.log_prob(x), stock)


def test_a_plate_is_one_mixture():
    weights, stds, centres, _, points = leaves((6,), (6, 4), (6, 4), (), (7, 4))
    compare(
        lambda w, s, m, x: mixture(w.expand(7, 6), m.expand(7, 6, 4), s.expand(7, 6, 4)).log_prob(x),
        weights, stds, centres, points, tolerance=1e-10,
    )  # fmt: skip


def test_a_component_of_probability_0_has_none():
    """torch takes the logarithm of about 1e-7 in its place: far from the others it decides."""
    components = Independent(Normal(torch.tensor([[0.0], [30.0]]), 1.0), 1)
    given = MixtureSameFamily(Categorical(probs=torch.tensor([1.0, 0.0])), components)
    at = torch.tensor([[30.0]])
    for _ in range(2):  # before and after somebody has asked for its logits
        with distributions.enable():
            torch.testing.assert_close(given.log_prob(at), Normal(0.0, 1.0).log_prob(at)[0])
        assert given.log_prob(at) > -20
    logits = Categorical(logits=torch.tensor([0.0, -200.0]))
    assert logits.probs[1] == 0
    with distributions.enable():
        torch.testing.assert_close(MixtureSameFamily(logits, components).log_prob(at), torch.tensor([-200.918945]))


def test_values_outside_the_support_are_refused_as_before():
    components = Independent(Normal(torch.zeros(2, 3), 1.0), 1)
    given = MixtureSameFamily(Categorical(torch.ones(2)), components, validate_args=True)  # zuko turns the default off
    with distributions.enable(), pytest.raises(ValueError, match="within the support"):
        given.log_prob(torch.full((3,), float("nan")))


def test_other_mixtures_stay_stock():
    for components in (Normal(torch.zeros(3), 1.0), Independent(Laplace(torch.zeros(3, 2), 1.0), 1)):
        given = MixtureSameFamily(Categorical(torch.ones(3)), components)
        at = torch.zeros(given.event_shape)
        stock = given.log_prob(at)
        with distributions.enable():
            assert torch.equal(given.log_prob(at), stock)


def test_kl_to_a_mixture_only_when_asked_for():
    q = Independent(Normal(torch.randn(5, 3), 0.5), 1)
    p = mixture(torch.zeros(1), torch.zeros(1, 3), torch.ones(1, 3))
    with distributions.enable(), pytest.raises(NotImplementedError):
        kl_divergence(q, p)
    with distributions.enable(mixture_kl=True):
        draws = kl_divergence(q.expand((4000, 5)), p)  # each of its own sample
        assert not torch.equal(kl_divergence(q, p), kl_divergence(q, p))
        with distributions.enable():
            kl_divergence(q, p)
    exact = kl_divergence(q, Independent(Normal(torch.zeros(3), 1.0), 1))
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 4000**0.5).all()


def test_what_another_library_registers_meanwhile_stays():
    def other(p, q):
        return "another library's"

    stock = torch_kl._KL_REGISTRY[Normal, Normal]
    with distributions.enable():
        register_kl(Normal, Normal)(other)
    assert kl_divergence(Normal(0.0, 1.0), Normal(0.0, 1.0)) == "another library's"
    register_kl(Normal, Normal)(stock)


def test_a_changed_torch_is_refused_and_nothing_replaced():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureSameFamily, "log_prob", lambda self, value, other: None)
        with pytest.raises(UnsupportedVersion, match="torch"):
            distributions.enable()
    assert torch_kl._KL_REGISTRY[Normal, Normal] is not distributions.kl_of_normals


def test_without_the_registry_it_is_refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkl.ops._torch.kl_registry", None)
        with pytest.raises(UnsupportedVersion, match="registered"):
            distributions.enable()


def test_second_derivatives_and_vmap():
    mu, std = leaves((3, 4), (3, 4))
    zero, one = torch.zeros(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    with distributions.enable():
        kl = lambda m, s: kl_divergence(Normal(m, s), Normal(zero, one))  # noqa: E731
        assert torch.autograd.gradgradcheck(kl, (mu, std))
        several = torch.func.vmap(kl)(torch.stack([mu, mu + 1]), torch.stack([std, std]))
        torch.testing.assert_close(several[1], kl(mu + 1, std))
