"""The figures and pictures of a run with a mixture prior, against a model whose log p(x) is known."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from torch import distributions

from fastkl.priors import GaussianMixture
from fastkl.vae import clusters, progress
from fastkl.vae.evaluate import evaluate, quick_elbo, quick_mixture

from vae_helpers import linear_gaussian, train

CPU = torch.device("cpu")
MIXTURE = {"components", "component_usage", "kl_bracket"}


def known_mixture() -> tuple:
    """x = W z + b + 0.7 noise with z from three Gaussians, so p(x) is a mixture of three; the encoder is that of the
    model with N(0, I), which is off here, and knows nothing of the components."""
    vae, _, marginal = linear_gaussian()
    weight, bias = vae.decoder.weight.detach(), vae.decoder.bias.detach()
    prior = GaussianMixture(3, 2)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 0.5, -0.5]))
        prior.means.copy_(torch.tensor([[-1.5, 0.0], [1.5, 1.0], [0.0, -2.0]]))
        prior.logvars.copy_(torch.tensor([0.25, 0.5, 0.3]).log()[:, None].expand(3, 2))
    noise = 0.49 * torch.eye(len(bias))
    covariances = weight @ torch.diag_embed(prior.logvars.detach().exp()) @ weight.T + noise
    components = distributions.MultivariateNormal(prior.means.detach() @ weight.T + bias, covariances)
    weights = distributions.Categorical(logits=prior.logits.detach())
    marginal = distributions.MixtureSameFamily(weights, components)
    label = weights.sample((200,))
    return vae, prior, components.sample((200,))[torch.arange(200), label], label, marginal


def test_figures_under_a_mixture_meet_the_exact_ones():
    torch.manual_seed(0)
    vae, prior, x, labels, marginal = known_mixture()
    result = evaluate(vae, x, 1000, 0, CPU, prior, labels)
    exact = marginal.log_prob(x)
    assert abs((result.log_prob - exact).mean()) < 0.05
    assert (result.log_prob - exact).abs().median() < 0.05
    figures = result.figures()
    assert figures["elbo"] < exact.mean()
    assert figures["kl_lower"] < figures["kl"] < figures["kl_upper"]
    q = vae.posterior(x)
    own = prior.kl(q, num_samples=2000)
    assert figures["kl"] == pytest.approx(own.mean().item(), abs=0.03)
    usage = prior.usage(q.mean)
    assert figures["used_components"] == usage.used == 3
    assert figures["usage_entropy"] == pytest.approx(usage.entropy.item(), abs=1e-4)
    assert figures["clustering_accuracy"] == figures["cluster_purity"] > 0.9
    without = evaluate(vae, x, 10, 0, CPU, prior).figures()
    assert "clustering_accuracy" not in without
    assert "components" not in evaluate(vae, x, 10, 0, CPU).figures()


def test_curves_under_a_mixture():
    torch.manual_seed(0)
    vae, prior, x, labels, _ = known_mixture()
    prior.means.data += 2.0  # or the KL to N(0, I) would be about the same
    figures = evaluate(vae, x, 200, 1, CPU, prior, labels).figures()
    assert abs(vae.posterior(x).kl().mean() - figures["kl"]) > 1.5
    elbo, kl, reconstruction = quick_elbo(vae, x, 0, CPU, prior)
    assert elbo == pytest.approx(reconstruction - kl)
    assert elbo == pytest.approx(figures["elbo"], abs=0.6)
    assert kl == pytest.approx(figures["kl"], abs=0.5)  # one draw per datum
    lower, estimate, upper, used = quick_mixture(vae, x, 0, CPU, prior)
    assert lower == pytest.approx(figures["kl_lower"], rel=1e-4)
    assert upper == pytest.approx(figures["kl_upper"], rel=1e-4)
    assert estimate == pytest.approx(figures["kl"], abs=0.15)
    assert used == figures["used_components"]


def test_agreement_of_clusters_and_labels():
    labels = np.array([0, 0, 0, 1, 1, 1])
    assert clusters.agreement(np.array([7, 7, 7, 2, 2, 2]), labels) == {
        "clustering_accuracy": 1.0, "cluster_purity": 1.0, "normalised_mutual_information": pytest.approx(1.0),
    }  # fmt: skip
    # Three clusters, of which two can be assigned: 2 of label 0, 3 of label 1.
    split = clusters.agreement(np.array([0, 0, 5, 1, 1, 1]), labels)
    assert split["clustering_accuracy"] == pytest.approx(5 / 6)
    assert split["cluster_purity"] == 1.0
    assert 0 < split["normalised_mutual_information"] < 1
    nothing = clusters.agreement(np.zeros(6, dtype=int), labels)
    assert nothing["clustering_accuracy"] == nothing["cluster_purity"] == 0.5
    assert nothing["normalised_mutual_information"] == pytest.approx(0.0)


def test_usage_counts_what_has_a_tenth_of_an_equal_share():
    # Of four components: all of the data, half of a tenth of a quarter, and none.
    responsibilities = torch.tensor([[0.9875, 0.0125, 0.0, 0.0]]).log().expand(5, 4)
    assert clusters.usage(responsibilities)["used_components"] == 1
    alike = clusters.usage(torch.full((5, 4), 0.25).log())
    assert alike == {"components": 4, "used_components": 4, "usage_entropy": pytest.approx(np.log(4))}


@pytest.mark.parametrize("name", ["gmm", "vamp"])
def test_report_of_a_mixture(tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    options = ("--prior", name, "--components", "6", "--warm-up", "5", "--importance-samples", "20")
    assert train(tmp_path, *options) == 0
    said = capsys.readouterr().out
    assert "of 6 used" in said
    pictures = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    assert pictures >= MIXTURE
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for figure in ("used_components", "usage_entropy", "kl_lower", "kl_upper", "clustering_accuracy", "cluster_purity",
                   "normalised_mutual_information"):  # fmt: skip
        assert np.isfinite(metrics[figure])
    bracket = metrics["history"]["mixture"]
    assert bracket[0]["step"] == 5, "the end of the warm-up"
    assert all(row["kl_lower"] <= row["kl"] <= row["kl_upper"] + 0.1 for row in bracket)
    page = (tmp_path / "report.html").read_text()
    for shown in ("Used components", "Clustering accuracy", "Mutual information", "KL bounds", "KL bracket"):
        assert shown in page


@pytest.mark.parametrize("name", ["gmm", "vamp", "flow"])
def test_spatial_latents_and_data_without_labels(tmp_path, name):
    pytest.importorskip("matplotlib")
    if name == "flow":
        pytest.importorskip("zuko")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 1, 8, 8)))
    options = ("--prior", name, "--warm-up", "4", "--model", "conv", "--layers", "1", "--batch-size", "16")
    more = ("--data", str(tmp_path / "x.npy"), "--importance-samples", "5", "--no-tensorboard")
    count = () if name == "flow" else ("--components", "3")
    assert train(tmp_path / "run", *options, *more, *count) == 0
    pictures = {path.stem for path in (tmp_path / "run" / "pictures").glob("*.png")}
    assert (pictures >= MIXTURE) == (name != "flow")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "clustering_accuracy" not in metrics
    assert np.isfinite(metrics["log_prob"])


def test_lines_tell_the_used_components(capsys, monkeypatch):
    history = {"mixture": [[5, 1.0, 2.0, 3.0, 4]]}
    settings = types.SimpleNamespace(components=9)
    run = types.SimpleNamespace(
        total_steps=10, batch_size=4, step=0, prior=GaussianMixture(9, 2), history=history, settings=settings
    )
    progress.Terminal(run).tested(run, 5, -1.0, 2.0, 1.0)
    assert "test -1.00 nats  4 of 9 used" in capsys.readouterr().out
