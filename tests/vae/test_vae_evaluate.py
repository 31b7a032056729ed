"""The figures of the report, against a model whose log p(x) is known, and against torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributions

import fastkl.vae
from fastkl.vae import streams
from fastkl.vae.evaluate import Evaluation, evaluate, mutual_information, quick_elbo
from fastkl.vae.model import build
from fastkl.vae.settings import Settings

from vae_helpers import linear_gaussian, scaling

CPU = torch.device("cpu")


def test_importance_weighted_estimate_meets_the_exact_log_prob():
    torch.manual_seed(0)
    vae, x, marginal = linear_gaussian()
    result = evaluate(vae, x, samples=1000, seed=0, device=CPU)
    exact = marginal.log_prob(x)
    assert (result.log_prob - exact).abs().max() < 0.25
    assert abs((result.log_prob - exact).mean()) < 0.02
    assert result.elbo.mean() < exact.mean() - 0.02, "the ELBO is a lower bound, and this encoder is not the posterior"
    with torch.no_grad():
        q = vae.posterior(x)
    prior = distributions.Normal(0.0, 1.0)
    kl = distributions.kl_divergence(distributions.Normal(q.mean, (q.logvar / 2).exp()), prior)
    torch.testing.assert_close(result.kl, kl.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.kl_per_dim, kl.mean(0), rtol=1e-5, atol=1e-6)


def test_samples_in_pieces_are_the_samples_at_once(monkeypatch):
    """With a fixed z the estimate has a value that does not depend on how many samples are in memory."""
    vae, x, _ = linear_gaussian()
    with torch.no_grad():
        vae.encoder.bias[2:].fill_(-40.0)  # the posterior's deviation is 2e-9: every draw is the mean
    whole = evaluate(vae, x, samples=7, seed=0, device=CPU)
    monkeypatch.setattr("fastkl.vae.evaluate.DECODED", 1)
    monkeypatch.setattr("fastkl.vae.evaluate.ENCODED", 15)
    pieces = evaluate(vae, x, samples=7, seed=0, device=CPU)
    torch.testing.assert_close(whole.reconstruction, pieces.reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.kl_per_dim, pieces.kl_per_dim)


def test_active_units_counts_dimensions_whose_mean_varies():
    vae, x, _ = linear_gaussian()
    assert evaluate(vae, x, samples=1, seed=0, device=CPU).active_units == 2
    with torch.no_grad():
        vae.encoder.weight[1].zero_()
    assert evaluate(vae, x, samples=1, seed=0, device=CPU).active_units == 1


def test_mutual_information_between_none_and_all():
    means, logvars = torch.randn(6, 2, 2, generator=torch.Generator().manual_seed(0)), torch.full((6, 2, 2), -1.0)
    assert abs(mutual_information(means[:1].expand(6, 2, 2), logvars, 0)) < 1e-6, "a latent that is the same for all"
    assert mutual_information(100 * means, logvars, 0) == pytest.approx(math.log(6), abs=1e-6), "or tells each datum"


def test_mutual_information_is_the_difference_of_two_kls(monkeypatch):
    """E KL(q(z|x) || p) - KL(q(z) || p), here by quadrature in one dimension."""
    means, logvars = torch.tensor([[-1.0], [0.3], [0.5], [2.0]]), torch.tensor([[-1.0], [0.0], [-3.0], [0.5]])
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    each = distributions.Normal(means.double(), (logvars.double() / 2).exp()).log_prob(z)
    average = each.logsumexp(0) - math.log(4)
    prior = distributions.Normal(0.0, 1.0).log_prob(z)
    kl = (each.exp() * (each - prior)).sum(1) * 0.001
    exact = kl.mean() - (average.exp() * (average - prior)).sum() * 0.001
    monkeypatch.setattr("fastkl.vae.evaluate.DRAWS", 200_000)
    assert mutual_information(means, logvars, 0) == pytest.approx(exact.item(), abs=0.005)


def test_quick_elbo_is_the_elbo():
    vae, _, marginal = linear_gaussian()
    x = marginal.sample((1000,))
    elbo, kl, reconstruction = quick_elbo(vae, x, 0, CPU)
    result = evaluate(vae, x, samples=100, seed=1, device=CPU).figures()
    assert elbo == pytest.approx(reconstruction - kl)
    assert kl == pytest.approx(result["kl"], rel=1e-4)
    assert elbo == pytest.approx(result["elbo"], abs=0.15)


@pytest.mark.parametrize(("model", "latent_shape"), [("mlp", (3,)), ("conv", (3, 4, 4))])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_models_against_torch_distributions(model, latent_shape, likelihood):
    torch.manual_seed(0)
    settings = Settings(model=model, latent=3, hidden=8, layers=1)
    vae = build(settings, (1, 8, 8), likelihood)
    x = torch.rand(4, 1, 8, 8)
    posterior = vae.posterior(x)
    assert vae.latent_shape == latent_shape
    assert vae.encoder(x).shape == (4, 2 * latent_shape[0], *latent_shape[1:])
    z = torch.randn(5, 4, *latent_shape)
    output = vae.decode(z)
    assert output.shape == (5, 4, 1, 8, 8)
    oracle = (
        output.sigmoid().log() * x + (-output).sigmoid().log() * (1 - x)
        if likelihood == "bernoulli"
        else distributions.Normal(output, 1.0).log_prob(x)
    )
    torch.testing.assert_close(vae.log_likelihood(z, x), oracle.flatten(2).sum(2), rtol=1e-5, atol=1e-4)
    (vae.log_likelihood(z, x).mean() - posterior.kl().mean()).backward()
    assert all(parameter.grad is not None for parameter in vae.encoder.parameters())


def test_streams_depend_on_every_number():
    seeds = {streams.seed_for(seed, what, step, rank)
             for seed in (0, 1) for what in ("noise", "order") for step in (0, 1, 2) for rank in (0, 1)}  # fmt: skip
    assert len(seeds) == 24
    epoch = torch.cat([streams.batch_indices(0, step, 10, 3) for step in range(3)])
    assert len(set(epoch.tolist())) == 9, "within an epoch no datum comes twice"
    assert not streams.batch_indices(0, 3, 10, 3).equal(streams.batch_indices(0, 0, 10, 3))


@pytest.mark.parametrize(
    ("likelihood", "values"),
    [
        ("logistic", np.arange(256, dtype=np.uint8)),  # of which the model has x / 255
        ("laplace", np.arange(256, dtype=np.uint8)),  # standardised
        ("normal", np.linspace(-1, 1, 256, dtype=np.float32)),
    ],
)
def test_errors_of_images_do_not_depend_on_their_scaling(tmp_path, likelihood, values):
    """PSNR, absolute and squared error of the reconstructions, as the numbers of the file have them."""
    x = np.random.default_rng(0).choice(values, (40, 1, 8, 8))
    model = fastkl.vae.train(x, out=tmp_path / "run", likelihood=likelihood, steps=2, hidden=8, latent=2)
    found = evaluate(model.vae, model.scaled(x), 1, 0, CPU, scaling=model.scaling).figures()
    span = float(values.max()) - float(values.min())
    error = (model.reconstruct(x).double().numpy() - x) / span
    assert found["absolute_error"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert found["squared_error"] == pytest.approx(np.square(error).mean(), rel=1e-4)
    psnr = 10 * np.log10(1 / np.square(error).reshape(40, -1).mean(1))
    assert found["psnr"] == pytest.approx(psnr.mean(), rel=1e-4)
    assert found["psnr_standard_error"] == pytest.approx(psnr.std(ddof=1) / math.sqrt(40), rel=1e-3)
    a, b = model.scaling.signed
    torch.testing.assert_close(
        a * model.scaled(x) + b, torch.from_numpy(2.0 * (x - float(values.min())) / span - 1).float()
    )


def test_vectors_have_no_peak_and_a_perfect_image_no_noise():
    vae, x, _ = linear_gaussian()
    assert "psnr" not in evaluate(vae, x, samples=1, seed=0, device=CPU, scaling=scaling("normal")).figures()
    zero = torch.zeros(3)
    found = Evaluation(zero, zero, zero, torch.zeros(3, 2), zero, 1, 0.0, errors=(zero, zero)).figures()
    assert found["psnr"] == math.inf
