"""What is done to a posterior of diffusers beyond its methods, with fastkl inside and without."""

import copy
import inspect
import pickle

import pytest
import torch

vae = pytest.importorskip("diffusers.models.autoencoders.vae")

from diffusers.models.autoencoders import autoencoder_oobleck  # noqa: E402

from fastkl.integrations import diffusers  # noqa: E402

STOCK, OOBLECK = vae.DiagonalGaussianDistribution, autoencoder_oobleck.OobleckDiagonalGaussianDistribution
BOTH = pytest.mark.parametrize("kind", [STOCK, OOBLECK])


def head(*shape: int, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moved(kind, p, name: str = "mean"):
    posterior = kind(p)
    setattr(posterior, name, getattr(posterior, name) + 3)
    return posterior


@pytest.mark.parametrize("name", ["mean", "logvar", "parameters"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_kl_to_replaced_moments_is_the_kl_to_these(name, compiled):
    """It was the KL to the posterior before: a number that looks right."""
    p, q = head(2, 8, 3, 3), head(2, 8, 3, 3, seed=2)

    def kl(p, q):
        return STOCK(p).kl(moved(STOCK, q, name))

    stock = STOCK(q)
    mean, logvar = (getattr(stock, each) + 3 * (each == name) for each in ("mean", "logvar"))
    exact = STOCK(p).kl(STOCK(torch.cat([mean, logvar], 1)))
    with diffusers.enable():
        run = torch.compile(kl, backend="eager", fullgraph=True) if compiled else kl
        torch.testing.assert_close(run(p, q), exact)


@BOTH
@pytest.mark.parametrize("name", ["mean", "logvar", "var", "parameters"])
def test_replaced_moments_are_computed_with_in_a_compiled_step_too(kind, name):
    def step(p):
        posterior = moved(kind, p, name)
        return [posterior.kl(), *([posterior.nll(0 * posterior.mean)] if kind is STOCK else [])]

    p = head(2, 8, 3, 3)
    stock = step(p)
    with diffusers.enable():
        torch.testing.assert_close(step(p), stock)
        torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(p), stock)


@BOTH
def test_a_posterior_made_outside_is_used_in_a_compiled_step(kind):
    p = head(2, 8, 3, 3)
    with diffusers.enable():
        step = torch.compile(lambda q: (q.sample(), q.kl(), q.std), backend="eager", fullgraph=True)
        torch.manual_seed(0)
        sample, *found = step(kind(p))
        torch.manual_seed(0)
        torch.testing.assert_close(sample, kind(p).sample())
        torch.testing.assert_close(found, [kind(p).kl(), kind(p).std])


@BOTH
def test_parameters_and_determinism_that_are_replaced_change_what_they_changed(kind):
    """The moments are those of the beginning."""

    def found(name, value) -> list[torch.Tensor]:
        posterior = kind(head(2, 8, 3, 3))
        setattr(posterior, name, value)
        return [posterior.kl(), posterior.std, posterior.sample(torch.Generator().manual_seed(3))]

    for change in (("parameters", head(2, 8, 3, 3, seed=2)), ("deterministic", True), ("deterministic", False)):
        stock = found(*change)
        with diffusers.enable():
            torch.testing.assert_close(found(*change), stock)


def test_a_kl_to_a_point_is_infinite():
    p = head(2, 8, 3, 3)
    before = STOCK(p, deterministic=True)
    with diffusers.enable():
        for other in (before, STOCK(p, deterministic=True)):
            assert STOCK(2 * p).kl(other).tolist() == [torch.inf] * 2


@BOTH
@pytest.mark.parametrize(
    "shapes", [((1, 8, 3, 4), (2, 8, 3, 4)), ((2, 8, 1, 1), (2, 8, 3, 4)), ((2, 8, 3, 4), (8, 1, 1))]
)
def test_kl_between_posteriors_that_broadcast(kind, shapes):
    p, q = (head(*shape, seed=seed) for seed, shape in enumerate(shapes))
    if q.dim() < p.dim():
        q = q[None]
    shape = torch.broadcast_shapes(p.shape, q.shape)
    with diffusers.enable():
        torch.testing.assert_close(kind(p).kl(kind(q)), kind(p.expand(shape)).kl(kind(q.expand(shape))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_oobleck_in_16_bits_keeps_its_digits(dtype):
    """Near the prior: deviations that are rounded to 16 bits change the KL by percents."""
    p = 0.02 * head(4, 128, 64)
    p[:, 64:] += 0.54  # softplus of it is 1
    p = p.to(dtype)
    with diffusers.enable():
        exact = OOBLECK(p.double()).kl()
        torch.testing.assert_close(OOBLECK(p).kl().double(), exact, rtol=2e-5, atol=0)
        torch.testing.assert_close(OOBLECK(2 * p).kl(OOBLECK(p)), OOBLECK(2 * p.float()).kl(OOBLECK(p.float())))
        for name in ("mean", "std", "var", "logvar"):
            assert torch.equal(getattr(OOBLECK(p), name), getattr(OOBLECK(p.float()), name).to(dtype)), name
        assert OOBLECK(p).sample().dtype == dtype


@pytest.mark.parametrize(
    "p", [torch.arange(144).view(2, 8, 3, 3) % 5, head(2, 3, 4, 4), head(2, 7, 4, 4), head(8), [1.0]]
)
def test_what_fastkl_cannot_compute_is_diffusers_own(p):
    """Integers, an odd number of channels and no channels."""

    def found(method) -> list:
        try:
            return [method(STOCK(p))]
        except Exception as error:
            return [type(error), str(error)]

    methods = [STOCK.kl, STOCK.sample, lambda q: q.std, lambda q: q.nll(q.mean)]
    torch.manual_seed(0)
    stock = [found(method) for method in methods]
    with diffusers.enable():
        torch.manual_seed(0)
        for actual, expected in zip([found(method) for method in methods], stock):
            assert len(actual) == len(expected)
            assert torch.equal(*actual, *expected) if len(actual) == 1 else actual == expected


@pytest.mark.parametrize("dims", [None, [], (1, 2, 3), [3, 2, 1], [-3, -2, -1], -1])
def test_nll_sums_any_dims(dims):
    p, x = head(2, 8, 3, 4), head(2, 4, 3, 4, seed=2)
    stock = STOCK(p).nll(x, dims)
    with diffusers.enable():
        torch.testing.assert_close(STOCK(p).nll(x, dims), stock)


@BOTH
def test_copies_have_what_a_user_has_set(kind):
    with diffusers.enable():
        posterior = kind(head(2, 8, 3, 3))
        posterior.timestep = torch.tensor(7)
        posterior.kl(), posterior.std
        for copied in (copy.copy(posterior), copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
            assert copied.timestep == 7
            assert torch.equal(copied.kl(), posterior.kl())
    copied = pickle.loads(pickle.dumps(posterior))
    assert (type(copied), copied.timestep) == (kind, 7)
    assert sorted(vars(copied)) == sorted([*vars(kind(posterior.parameters)), "timestep"])


@BOTH
def test_it_can_be_inspected_as_before(kind):
    stock = inspect.signature(kind), inspect.getdoc(kind.__init__)
    with diffusers.enable():
        assert (inspect.signature(kind), inspect.getdoc(kind.__init__)) == stock
        assert {"kl", "sample"} <= dict(inspect.getmembers(type(kind(head(2, 8, 3, 3))))).keys()
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\.__init__\(\)|^__init__\(\)"):
            kind()
