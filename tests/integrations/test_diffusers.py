"""diffusers with fastkl inside, against itself in float64."""

import copy
import inspect
import pickle
import zlib

import pytest
import torch

vae = pytest.importorskip("diffusers.models.autoencoders.vae")

from diffusers.models.autoencoders import autoencoder_oobleck  # noqa: E402

from fastkl.integrations import diffusers  # noqa: E402
from fastkl.integrations._switch import UnsupportedVersion  # noqa: E402

STOCK, OOBLECK = vae.DiagonalGaussianDistribution, autoencoder_oobleck.OobleckDiagonalGaussianDistribution


def heads(*shape: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(x.to(dtype).requires_grad_() for x in drawn)


def compare(function, *tensors: torch.Tensor) -> None:
    """Value and gradients with and without fastkl."""

    def run() -> list[torch.Tensor]:
        value = function(*tensors)
        return [value, *torch.autograd.grad(value.square().sum(), tensors, allow_unused=True)]

    expected = run()
    with diffusers.enable():
        actual = run()
    for found, true in zip(actual, expected, strict=True):
        assert (found is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-11)


def drawn(posterior) -> torch.Tensor:
    return posterior.sample(torch.Generator().manual_seed(3))


METHODS = {
    "kl": lambda p, q: STOCK(p).kl(),
    "kl to another one": lambda p, q: STOCK(p).kl(STOCK(q)),
    "sample": lambda p, q: drawn(STOCK(p)),
    "mode": lambda p, q: STOCK(p).mode(),
    "nll": lambda p, q: STOCK(p).nll(q.chunk(2, 1)[0]),
    "nll over one dimension": lambda p, q: STOCK(p).nll(q.chunk(2, 1)[0], dims=1),
    "nll over some dimensions": lambda p, q: STOCK(p).nll(q.chunk(2, 1)[0], dims=[2, 3]),
    "mean": lambda p, q: STOCK(p).mean,
    "logvar": lambda p, q: STOCK(p).logvar,
    "std": lambda p, q: STOCK(p).std,
    "var": lambda p, q: STOCK(p).var,
    "deterministic sample": lambda p, q: drawn(STOCK(p, deterministic=True)),
}


@pytest.mark.parametrize("method", METHODS)
def test_images_have_what_they_had(method):
    compare(METHODS[method], *heads(3, 8, 5, 6))


def test_log_variances_are_clamped_as_before():
    p, q = heads(2, 8, 3, 3)
    for method in METHODS.values():
        compare(method, (20 * p).detach().requires_grad_(), q)


def test_a_deterministic_posterior_has_no_kl():
    stock = STOCK(heads(2, 8, 3, 3)[0], deterministic=True)
    with diffusers.enable():
        fused = STOCK(stock.parameters, deterministic=True)
        assert torch.equal(fused.kl(), stock.kl())
        assert torch.equal(fused.nll(fused.mean), stock.nll(stock.mean))
        assert not fused.std.any()
        assert not fused.var.any()


@pytest.mark.parametrize("shape", [(2, 8, 7), (2, 8, 3, 4, 5)])
def test_one_value_for_each_datum_whatever_the_rank(shape):
    """Audio and video: diffusers fails, and sums dimensions 1 to 3 of five."""
    p, x = heads(*shape)
    with diffusers.enable():
        posterior = STOCK(p)
        kl, nll = posterior.kl(), posterior.nll(x.chunk(2, 1)[0])
    mean, logvar = p.chunk(2, 1)
    terms = 0.5 * (logvar.exp() + mean**2 - 1 - logvar).flatten(1)
    torch.testing.assert_close(kl, terms.sum(1))
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    torch.testing.assert_close(nll, -normal.log_prob(x.chunk(2, 1)[0]).flatten(1).sum(1))


def test_kl_in_bfloat16_keeps_its_digits():
    p = (0.01 * heads(4, 8, 16, 16)[0]).detach().bfloat16()
    exact = STOCK(p.double()).kl()
    assert (STOCK(p).kl() / exact - 1).abs().max() > 0.2
    with diffusers.enable():
        torch.testing.assert_close(STOCK(p).kl().double(), exact, rtol=1e-5, atol=0)


def test_oobleck_has_the_kl_itself():
    """Not twice the KL, and with the ratio of the variances the right way round."""
    p, q = (0.2 * x for x in heads(2, 8, 7))
    normals = [torch.distributions.Normal(OOBLECK(x).mean, OOBLECK(x).std) for x in (p, q)]
    exact = torch.distributions.kl_divergence(*normals).sum(1).mean()
    unit = torch.distributions.Normal(torch.zeros((), dtype=p.dtype), 1.0)
    twice, other = OOBLECK(p).kl(), OOBLECK(p).kl(OOBLECK(q))
    with diffusers.enable():
        torch.testing.assert_close(OOBLECK(p).kl(), torch.distributions.kl_divergence(normals[0], unit).sum(1).mean())
        torch.testing.assert_close(2 * OOBLECK(p).kl(), twice)
        torch.testing.assert_close(OOBLECK(p).kl(OOBLECK(q)), exact)
    wrong_sign = 2 * (OOBLECK(p).logvar - OOBLECK(q).logvar).sum(1).mean()
    torch.testing.assert_close(other, 2 * exact + wrong_sign)
    compare(lambda p, q: drawn(OOBLECK(p)), p, q)
    compare(lambda p, q: OOBLECK(p).logvar, p, q)


def test_a_deterministic_oobleck_keeps_its_moments():
    """In diffusers, only its KL is another one."""
    p, _ = heads(2, 8, 7)
    for name in ("std", "var", "logvar"):
        compare(lambda p, name=name: getattr(OOBLECK(p, deterministic=True), name), p)
    compare(lambda p: drawn(OOBLECK(p, deterministic=True)), p)
    with diffusers.enable():
        assert torch.equal(OOBLECK(p, deterministic=True).kl(), torch.Tensor([0.0]))
        assert OOBLECK(p[:0]).kl().isnan()  # a mean of nothing, as in diffusers


@pytest.mark.parametrize("name", ["mean", "logvar", "std", "var"])
def test_moments_that_are_replaced_are_computed_with(name):
    def changed(p):
        posterior = STOCK(p)
        setattr(posterior, name, 2 * getattr(posterior, name))
        return posterior

    p, _ = heads(2, 8, 3, 3)
    compare(lambda p: changed(p).kl(), p)
    compare(lambda p: drawn(changed(p)), p)


@pytest.mark.parametrize("kind", [STOCK, OOBLECK])
def test_a_compiled_step_is_one_graph(kind):
    def step(p, q):
        posterior = kind(p)
        found = [posterior.mode() + posterior.std, posterior.kl(), posterior.kl(kind(q))]
        return [*found, posterior.nll(q.chunk(2, 1)[0])] if kind is STOCK else found

    p, q = heads(2, 8, 3, 3, 2)  # a video
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    stock = compiled(p, q)
    with diffusers.enable():
        expected = step(p, q)
        torch.testing.assert_close(compiled(p, q), expected)
        returned = torch.compile(lambda p: kind(p), backend="eager", fullgraph=True)(p)
        torch.testing.assert_close(returned.kl(), expected[1])
    assert stock[1].shape != expected[1].shape or not torch.isclose(stock[1], expected[1])
    torch.testing.assert_close(compiled(p, q), stock, rtol=0, atol=0)
    torch.testing.assert_close(returned.kl(), stock[1], rtol=0, atol=0)


def test_posteriors_outlive_the_switch_and_earlier_ones_stay():
    p, _ = heads(2, 8, 3, 3)
    before = STOCK(p)
    with diffusers.enable():
        during = STOCK(p)
        assert isinstance(during, STOCK)
        assert type(before) is STOCK
        torch.testing.assert_close(during.kl(before), torch.zeros(2, dtype=p.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(during.kl(), before.kl())
    torch.testing.assert_close(before.kl(during), torch.zeros(2, dtype=p.dtype), atol=1e-12, rtol=0)
    assert type(STOCK(p)) is STOCK


def test_disabled_it_leaves_the_classes_as_they_were():
    before = dict(vars(STOCK)), dict(vars(OOBLECK))
    with diffusers.enable():
        assert dict(vars(STOCK)) != before[0]
    assert (dict(vars(STOCK)), dict(vars(OOBLECK))) == before


def test_posteriors_are_copied_and_pickled():
    with diffusers.enable():
        posterior = STOCK(heads(2, 8, 3, 3)[0].detach())
        for other in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
            assert torch.equal(other.kl(), posterior.kl())
            assert other.parameters is not posterior.parameters
    assert type(pickle.loads(pickle.dumps(posterior))) is STOCK


def test_a_subclass_keeps_its_own():
    class Mine(STOCK):
        def kl(self, other=None):
            return "mine"

    with diffusers.enable():
        assert Mine(heads(2, 8, 3, 3)[0]).kl() == "mine"


def test_other_methods_are_refused(monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STOCK, "kl", lambda self, other, dims: None)
        with pytest.raises(UnsupportedVersion, match="diffusers"):
            diffusers.enable()
    assert type(STOCK(heads(2, 8, 3, 3)[0])) is STOCK


def test_an_autoencoder_trains_as_before():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=4)
    images = torch.rand(2, 3, 16, 16)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        posterior = model.encode(images).latent_dist
        z = posterior.sample(torch.Generator().manual_seed(2))
        loss = (model.decode(z).sample - images).square().mean() + 1e-3 * posterior.kl().mean()
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    expected = step()
    with diffusers.enable():
        actual = step()
    for found, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-6)


def test_the_classes_are_those_that_were_read():
    """In diffusers 0.42.1. If their source changes, read it, run the tests above, and update the checksum here."""
    sums = [zlib.crc32(inspect.getsource(stock).encode()) for stock in (STOCK, OOBLECK)]
    assert sums == [1539867904, 1267459029]
