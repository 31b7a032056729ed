"""The likelihoods of the reference VAE, against scipy and against sums over all values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fastkl import vae
from fastkl.vae import likelihood
from fastkl.vae.cli import main

from vae_helpers import BARE, datasets, refused, train

integrate, special, stats = (pytest.importorskip(f"scipy.{name}") for name in ("integrate", "special", "stats"))

SHAPE = (1, 2, 3)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def total(terms):
    return torch.from_numpy(terms.reshape(*terms.shape[:-3], -1).sum(-1)).float()


def test_counts_are_those_of_scipy():
    counts, output = torch.arange(24.0).view(4, *SHAPE), 3 * draw(5, 4, *SHAPE)
    poisson = likelihood.make("poisson", SHAPE, 0)
    expected = total(stats.poisson.logpmf(counts.numpy(), np.exp(output.double().numpy())))
    torch.testing.assert_close(poisson.log_prob(counts.expand(5, 4, *SHAPE), output), expected, rtol=1e-5, atol=1e-4)
    for log_size in (-2.0, 0.0, 5.0):
        own = likelihood.make("negative_binomial", SHAPE, 0)
        torch.nn.init.constant_(own.log_size, log_size)
        r, mean = math.exp(log_size), np.exp(output.double().numpy())
        expected = total(stats.nbinom.logpmf(counts.numpy(), r, r / (r + mean)))
        torch.testing.assert_close(own.log_prob(counts.expand(5, 4, *SHAPE), output), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(poisson.mean(output), output.exp())
    torch.testing.assert_close(poisson.seen(counts), torch.log(1 + counts))


def test_laplace_is_that_of_scipy():
    x, output, own = draw(4, *SHAPE), draw(4, *SHAPE, seed=1), likelihood.make("laplace", SHAPE, 0)
    torch.nn.init.constant_(own.log_scale, -1.5)
    expected = total(stats.laplace.logpdf(x.numpy(), output.numpy(), math.exp(-1.5)))
    torch.testing.assert_close(own.log_prob(x, output), expected, rtol=1e-5, atol=1e-5)


def huber(x, mean, scale):
    """ln p by its definition in float64, with the normaliser by quadrature."""
    k = 1.345

    def rho(u):
        return u * u / 2 if abs(u) <= k else k * abs(u) - k * k / 2

    inside, _ = integrate.quad(lambda u: math.exp(-rho(u)), 0, k)
    outside, _ = integrate.quad(lambda u: math.exp(-rho(u)), k, math.inf)
    return -rho((x - mean) / scale) - math.log(2 * scale * (inside + outside))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_scale", [-3.0, 0.0, 1.0])
def test_huber_is_its_density_with_the_normaliser_of_a_quadrature(dtype, log_scale):
    """Also of a decoder's bfloat16 output: the error is that of the output alone."""
    x, output, own = 3 * draw(4, *SHAPE), draw(4, *SHAPE, seed=1).to(dtype), likelihood.make("huber", SHAPE, 0)
    torch.nn.init.constant_(own.log_scale, log_scale)
    pairs = zip(x.flatten().tolist(), output.double().flatten().tolist())
    expected = total(np.array([huber(*pair, math.exp(log_scale)) for pair in pairs]).reshape(4, *SHAPE))
    torch.testing.assert_close(own.log_prob(x, output), expected, rtol=1e-5, atol=1e-5)


def test_huber_has_the_gradients_of_its_two_parts():
    own, output = likelihood.make("huber", (1,), 0), torch.tensor([[0.3], [-5.0], [1e30]], requires_grad=True)
    own.log_prob(torch.zeros(3, 1), output).sum().backward()
    torch.testing.assert_close(output.grad, torch.tensor([[-0.3], [1.345], [-1.345]]))
    assert own.log_scale.grad.isfinite()


@pytest.mark.parametrize("name", ["normal", "laplace", "huber"])
def test_a_given_scale_is_not_learned(name):
    """And is the scale at which a learned one has the same density."""
    x, output = draw(4, *SHAPE), draw(4, *SHAPE, seed=1)
    given, learned = likelihood.make(name, SHAPE, 0, scale=0.2), likelihood.make(name, SHAPE, 0)
    assert not list(given.parameters())
    (log_scale,) = learned.parameters()
    torch.nn.init.constant_(log_scale, math.log(0.2) * (2 if name == "normal" else 1))
    torch.testing.assert_close(given.log_prob(x, output), learned.log_prob(x, output))
    reference = {"normal": stats.norm, "laplace": stats.laplace}
    if name in reference:
        expected = total(reference[name].logpdf(x.numpy(), output.numpy(), 0.2))
        torch.testing.assert_close(given.log_prob(x, output), expected, rtol=1e-5, atol=1e-4)


def test_a_scale_is_given_to_likelihoods_that_have_one(tmp_path, capsys):
    assert "--scale 0.2 needs --likelihood normal, laplace or huber, got bernoulli" in refused(
        capsys, tmp_path / "none", "--scale", "0.2"
    )
    assert "--scale must be a finite number" in refused(capsys, tmp_path / "none", "--scale", "-1")
    options = ("--likelihood", "huber", "--scale", "0.2", "--ema", "0.9")
    assert train(tmp_path / "run", *BARE, *options, "--steps", "4") == 0
    assert vae.load(tmp_path / "run").vae.observation.log_scale.item() == pytest.approx(math.log(0.2))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("log_scale", [-12.0, -3.0, 1.0])
def test_a_logistic_level_has_the_mass_between_its_midpoints(levels, log_scale):
    own = likelihood.make("logistic", (1,), levels)
    torch.nn.init.constant_(own.log_scale, log_scale)
    x = torch.linspace(0, 1, levels).unsqueeze(-1)
    for mean in (-0.4, 0.0, 0.3, 1.0, 1.7):
        found = own.log_prob(x, torch.full((levels, 1), mean)).detach()
        assert found.logsumexp(0).item() == pytest.approx(0, abs=1e-4), "one of the levels is drawn"
        edges = (np.arange(1, levels) - 0.5) / (levels - 1)
        standard = (edges - mean) / math.exp(log_scale)
        if levels > 2 and log_scale > -4:  # where a difference of cdfs in float64 has digits
            cdf = np.concatenate([[0.0], special.expit(standard), [1.0]])
            expected = np.log(np.diff(cdf))
            use = np.diff(cdf) > 1e-9
            np.testing.assert_allclose(found.numpy()[use], expected[use], rtol=1e-3, atol=1e-4)


def test_logistic_gradients_are_finite_far_from_the_mean():
    own, output = likelihood.make("logistic", (1,), 256), torch.tensor([[80.0], [-80.0]], requires_grad=True)
    torch.nn.init.constant_(own.log_scale, -7.0)
    own.log_prob(torch.tensor([[0.0], [1.0]]), output).sum().backward()
    assert output.grad.isfinite().all()
    assert own.log_scale.grad.isfinite().all()


def test_a_categorical_level_has_the_softmax_of_its_logits():
    own, output = likelihood.make("categorical", SHAPE, 5), draw(3, 5, *SHAPE)
    levels = torch.randint(5, (3, *SHAPE), generator=torch.Generator().manual_seed(2))
    expected = -torch.nn.functional.cross_entropy(output, levels, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(own.log_prob(levels / 4, output), expected)
    torch.testing.assert_close(own.log_prob((levels / 4).expand(2, 3, *SHAPE), output.expand(2, 3, 5, *SHAPE)),
                               expected.expand(2, 3))  # fmt: skip
    weights = output.softmax(1)
    torch.testing.assert_close(own.mean(output), (weights * torch.arange(5.0).view(5, 1, 1, 1)).sum(1) / 4)


@pytest.mark.parametrize("model", ["mlp", "conv"])
@pytest.mark.parametrize("name", ["logistic", "categorical", "laplace", "huber", "poisson", "negative_binomial"])
def test_a_run_learns_by_each_likelihood(tmp_path, name, model):
    layers = ("--layers", "1") if model == "conv" else ()
    options = ("--likelihood", name, "--model", model, *layers, "--steps", "30", "--learning-rate", "0.01")
    assert train(tmp_path / "run", *BARE, *options) == 0
    loaded, x = vae.load(tmp_path / "run"), datasets.load_digits().images[:7]
    first, *_, last = json_of(tmp_path / "run")
    assert last[1] > first[1], "the ELBO has risen"
    assert loaded.reconstruct(x).shape == (7, 1, 8, 8)
    assert 2 < loaded.reconstruct(x).mean() < 8, "grey levels of the file, whose mean is about 5"
    assert loaded.log_prob(x, num_samples=3).shape == (7,)


def json_of(folder):
    from fastkl.vae import checkpoint

    return checkpoint.load(folder)["history"]["test"]


def test_bits_per_dimension_are_in_the_figures(tmp_path, capsys):
    assert train(tmp_path / "run", *BARE, "--likelihood", "logistic") == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--importance-samples", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_dimension"] == pytest.approx(-found["log_prob"] / (64 * math.log(2)), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.random.default_rng(0).random((20, 3)), ("--likelihood", "poisson"), "needs counts, whole numbers from 0"),
        (np.arange(-20, 40).reshape(20, 3), ("--likelihood", "negative_binomial"), "needs counts, whole numbers"),
        (np.random.default_rng(0).random((20, 3)), ("--likelihood", "logistic"), "needs whole numbers, the levels"),
        (np.arange(60000).reshape(20, 3000), ("--likelihood", "categorical"), "takes at most 256 levels, got 65536"),
        (np.arange(60).reshape(20, 3), ("--likelihood", "poisson", "--model", "autoregressive"),
         "--model autoregressive needs --likelihood bernoulli or normal, got poisson"),
    ],
)  # fmt: skip
def test_data_that_do_not_go_with_a_likelihood(tmp_path, capsys, values, options, message):
    np.save(tmp_path / "x.npy", values)
    assert message in refused(capsys, tmp_path / "run", "--data", str(tmp_path / "x.npy"), *options)


def test_counts_in_floating_point_are_counts(tmp_path):
    values = np.random.default_rng(0).poisson(3.0, (50, 6))
    for dtype in (np.int64, np.float32):
        model = vae.train(values.astype(dtype), out=tmp_path / dtype.__name__, likelihood="poisson", steps=3, hidden=8)
        torch.testing.assert_close(model.scaled(values), torch.from_numpy(values).float())
