"""The decoder that reads what it predicts: its conditionals, their product, its draws, and a run from end to end."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import distributions

from fastkl.vae import checkpoint
from fastkl.vae.autoregressive import LARGEST
from fastkl.vae.errors import UserError
from fastkl.vae.evaluate import evaluate
from fastkl.vae.model import VAE, build
from fastkl.vae.settings import Settings

from vae_helpers import BARE, assert_same, train

CPU = torch.device("cpu")
# Fewer hidden units than values and more of them, one layer and two, a vector, channels, a single value.
SIZES = [((12,), 5, 1), ((2, 2, 3), 24, 2), ((1, 3, 3), 9, 3), ((1,), 4, 1)]


def made(shape: tuple, hidden: int = 16, layers: int = 2, likelihood: str = "bernoulli") -> VAE:
    torch.manual_seed(0)
    vae = build(Settings(model="autoregressive", latent=2, hidden=hidden, layers=layers), shape, likelihood)
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(3)  # as far from independent values as a trained one
    return vae


@pytest.mark.parametrize(("shape", "hidden", "layers"), SIZES)
def test_value_i_is_predicted_from_z_and_all_values_before_it(shape, hidden, layers):
    vae = made(shape, hidden, layers)
    features = math.prod(shape)
    z, x = torch.randn(2), torch.randn(shape)
    by_x = torch.autograd.functional.jacobian(lambda x: vae.decode(z, x), x).reshape(features, features)
    assert not by_x.triu().any(), "no value is read by itself or by an earlier one"
    assert (by_x.tril(-1) != 0).sum() == features * (features - 1) // 2, "and none before it is left out"
    by_z = torch.autograd.functional.jacobian(lambda z: vae.decode(z, x), z)
    assert (by_z != 0).all()


def test_every_hidden_unit_is_used():
    """One that nothing reads, or that reads nothing, would be weights for nothing."""
    vae = made((12,), 24, 2)
    for layer in vae.decoder.layers:
        assert layer.mask.any(dim=0)[:-1].all(), "only the last value is read by none"
    (vae.decode(torch.randn(8, 2), torch.rand(8, 12)) ** 2).mean().backward()
    for from_latent in vae.decoder.from_latent:
        assert from_latent.weight.grad.any(dim=1).all()


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
def test_probabilities_of_all_data_sum_to_one(shape):
    vae = made(shape)
    everything = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6))).reshape(-1, *shape)
    z = torch.randn(3, 1, 2)
    total = vae.log_likelihood(z, everything).logsumexp(dim=1)
    torch.testing.assert_close(total, torch.zeros(3), rtol=0, atol=1e-5)


def test_normal_likelihood_is_a_density():
    """Integrated over a grid; of two values, so that the second is conditional on the first."""
    vae = made((2,), likelihood="normal")
    with torch.no_grad():
        vae.observation.logvar.copy_(torch.tensor([-1.0, 0.5]))
    axis = torch.linspace(-15, 15, 601)
    log_prob = vae.log_likelihood(torch.randn(2), torch.cartesian_prod(axis, axis))
    assert (log_prob.exp().sum() * 0.05**2).item() == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_draws_have_the_probabilities_of_the_model():
    vae, count = made((4,)), 20_000
    everything = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)))
    z = torch.randn(2)
    wanted = vae.log_likelihood(z, everything).exp()
    torch.manual_seed(1)
    drawn, _ = vae.decoder.sample(z.expand(count, 2), vae.drawn)
    found = torch.bincount((drawn @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long(), minlength=16) / count
    assert ((found - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / count).sqrt()).all()


@pytest.mark.parametrize(("shape", "hidden", "layers"), SIZES)
def test_a_draw_comes_with_its_conditionals(shape, hidden, layers):
    """Drawing computes each hidden unit when its inputs are there; it must be what the whole pass gives afterwards."""
    vae = made(shape, hidden, layers)
    z = torch.randn(3, 5, 2)
    drawn, output = vae.decoder.sample(z, vae.drawn)
    assert drawn.shape == (3, 5, *shape)
    torch.testing.assert_close(output, vae.decode(z, drawn), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_normal_draws_have_the_moments_of_the_conditionals():
    vae = made((3,), likelihood="normal")
    vae.observation.logvar.copy_(torch.tensor([-2.0, 0.0, 2.0]))
    torch.manual_seed(1)
    drawn, means = vae.decoder.sample(torch.randn(20_000, 2), vae.drawn)
    noise = (drawn - means) / (vae.observation.logvar / 2).exp()
    assert noise.mean(dim=0).abs().max() < 0.03
    assert (noise.std(dim=0) - 1).abs().max() < 0.03
    assert torch.corrcoef(noise.T).tril(-1).abs().max() < 0.03


def test_log_likelihood_of_samples_is_that_of_each():
    vae = made((1, 3, 3), likelihood="normal")
    z, x = torch.randn(5, 4, 2), torch.randn(4, 1, 3, 3)
    each = torch.stack([vae.log_likelihood(z[index], x) for index in range(5)])
    torch.testing.assert_close(vae.log_likelihood(z, x), each)
    oracle = distributions.Normal(vae.decode(z[0], x), 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(each[0], oracle)


@torch.no_grad()
def test_grey_values_are_drawn_once_for_all_samples(monkeypatch):
    """In pieces or not, every sample of z is weighed by the same zeros and ones; the encoder reads the grey values."""
    vae = made((1, 3, 3))
    for parameter in vae.decoder.from_latent.parameters():
        parameter.zero_()  # p(x | z) = p(x), so that all weights are p(x) where the posterior is the prior
    vae.encoder[-1].weight.zero_()
    vae.encoder[-1].bias.zero_()
    monkeypatch.setattr("fastkl.vae.evaluate.DECODED", 1)
    x = torch.rand(6, 1, 3, 3)
    result = evaluate(vae, x, samples=20, seed=0, device=CPU)
    torch.testing.assert_close(result.log_prob, result.reconstruction)
    drawn = torch.stack([vae.observed(x) for _ in range(2000)])
    assert drawn.unique().tolist() == [0, 1]
    assert (drawn.mean(dim=0) - x).abs().max() < 0.06
    torch.manual_seed(2)
    found = vae.log_likelihood(torch.zeros(6, 2), x)
    torch.manual_seed(2)
    assert found.equal(vae.log_likelihood(torch.zeros(6, 2), vae.observed(x)))


def test_refuses_data_too_large_to_draw():
    with pytest.raises(UserError, match=f"at most, got {LARGEST + 1:,}"):
        made((LARGEST + 1,))


def test_trains_resumes_and_reports(tmp_path, capsys):
    """Grey digits; a run that was stopped and goes on is the run that was not, bit for bit, though pixels are drawn."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--model", "autoregressive", "--schedule", "constant")
    assert train(whole, *BARE, *options) == 0
    assert train(parts, *BARE, *options, "--steps", "6") == 0
    assert train(parts, *BARE[1:], "--resume", "--importance-samples", "3") == 0
    first, second = (checkpoint.load(folder) for folder in (whole, parts))
    assert_same(first["model"], second["model"])
    assert first["history"]["train"] == second["history"]["train"]
    metrics = json.loads((parts / "metrics.json").read_text())
    assert metrics["elbo"] == pytest.approx(metrics["reconstruction"] - metrics["kl"], rel=1e-5)
    assert metrics["log_prob"] > metrics["elbo"]
    assert not [name for name in second["model"] if "mask" in name]
    assert len(list((parts / "pictures").iterdir())) == 5
