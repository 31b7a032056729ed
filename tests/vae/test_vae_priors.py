"""Training with learned priors: the warm-up, the mixture's start, resuming, two processes, and what is refused."""

from __future__ import annotations

import math
import signal
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from fastkl.vae import checkpoint, loop, prior, streams
from fastkl.vae.data import Data
from fastkl.vae.errors import UserError
from fastkl.vae.guard import Guard
from fastkl.vae.model import VAE
from fastkl.vae.rules import resolve
from fastkl.vae.settings import Settings

from vae_helpers import BARE, SMALL, assert_same_state, fork_each, refused, scaling, train

CPU = torch.device("cpu")
PRIORS = {
    "gmm": ("--prior", "gmm", "--components", "5", "--samples", "2"),
    "vamp": ("--prior", "vamp", "--components", "4", "--kl", "upper"),
    "flow": ("--prior", "flow", "--samples", "2"),
    "relaxed": ("--prior", "gmm", "--components", "5", "--kl", "relaxed", "--samples", "2", "--final-tau", "0.2"),
}
FITTED = ("gmm", "relaxed")
WARM = ("--warm-up", "5")


def options_of(name: str) -> tuple[str, ...]:
    if name == "flow":
        pytest.importorskip("zuko")
    return (*PRIORS[name], *WARM)


@pytest.mark.parametrize("name", PRIORS)
def test_stopped_runs_go_on_bit_for_bit(tmp_path, monkeypatch, name):
    """Stopped during the warm-up, at its end, where the mixture is fitted, and after it; with noise="datum", too."""
    options = (*options_of(name), *BARE, *(("--noise", "datum") if name in FITTED else ()))
    real, states = loop.batch, {}
    assert train(tmp_path / "whole", *options) == 0
    for stop in (2, 4, 7):

        def interrupted(run, stop=stop):
            states[run.step] = {key: value.clone() for key, value in run.vae.prior.state_dict().items()}
            if run.step == stop:
                signal.raise_signal(signal.SIGINT)
            return real(run)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "batch", interrupted)
            resume = ("--resume",) if (tmp_path / "run").exists() else ()
            assert train(tmp_path / "run", *options, *resume) == 130
        assert checkpoint.load(tmp_path / "run")["step"] == stop + 1
    assert train(tmp_path / "run", *options, "--resume") == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    # Untouched up to the end of the warm-up, and trained after it.
    assert all(states[0][key].equal(value) for key, value in states[4].items())
    moved = [not states[5][key].equal(value) for key, value in states[7].items()]
    assert all(moved) if name != "flow" else any(moved), "a flow has masks as well"
    assert any(not states[0][key].equal(value) for key, value in states[5].items()) == (name in FITTED), "the fit"


def test_prior_starts_if_the_last_warm_up_step_is_skipped(tmp_path, monkeypatch):
    began, real = [], loop.start_prior
    monkeypatch.setattr(loop, "start_prior", lambda run: (began.append(run.step), real(run)))
    monkeypatch.setattr(Guard, "admit", lambda self, loss, parameters, step, scaled: step not in (5, 6))
    assert train(tmp_path, *PRIORS["gmm"], *WARM, *BARE) == 0
    assert began == [5]
    state = checkpoint.load(tmp_path)
    assert state["history"]["mixture"][0][0] == 5
    optimizer = state["optimizers"]["autoencoder"]
    counts = [
        {int(optimizer["state"][index]["step"]) for index in group["params"]} for group in optimizer["param_groups"]
    ]
    assert counts == [{10}, {6}]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")
def test_two_processes_do_what_one_with_their_batch_does(tmp_path):
    same = (*SMALL, *WARM, *BARE, "--schedule", "constant", "--log-every", "1", "--noise", "datum")
    # Two components: after five steps the centres of more lie so close together that rounding decides which of them is
    # the nearest to a datum, and the fit begins with another share of the data.
    few = {name: ("--components", "2") if name in FITTED else () for name in PRIORS}
    options = {
        name: (*same, *given, *few[name]) for name, given in PRIORS.items() if name != "flow" or find_spec("zuko")
    }
    done = fork_each(tmp_path / "two", {name: (*given, "--batch-size", "32") for name, given in options.items()})
    assert done.returncode == 0, done.stderr
    for name, given in options.items():
        assert train(tmp_path / "one" / name, *given, "--batch-size", "64") == 0
        two, one = (checkpoint.load(tmp_path / folder / name) for folder in ("two", "one"))
        losses = [torch.tensor(state["history"]["train"], dtype=torch.float64) for state in (two, one)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-5)
        assert set(two["model"]) == set(one["model"])


def test_noise_of_the_choice_follows_the_datum(tmp_path, monkeypatch):
    """Other noise of the choice alone is seen in the losses, or two processes agreeing would prove little."""
    same = (*options_of("relaxed"), *BARE, "--noise", "datum", "--log-every", "1")
    real, losses = streams.seed_for, []
    for choice in ("choice", "another"):

        def other(seed, purpose, *more, choice=choice):
            return real(seed, choice if purpose == "choice" else purpose, *more)

        with monkeypatch.context() as patch:
            patch.setattr(streams, "seed_for", other)
            assert train(tmp_path / choice, *same) == 0
        losses.append(torch.tensor(checkpoint.load(tmp_path / choice)["history"]["train"]))
    assert losses[0][:5].equal(losses[1][:5])
    assert ((losses[0] - losses[1])[5:, 2].abs() > 1e-3).any()


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_a_prior_has_its_own_learning_rate_and_no_decay(tmp_path, monkeypatch, rate):
    rates, real = [], torch.optim.AdamW.step

    def recording(self, *given):
        rates.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
        return real(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    options = ("--prior", "vamp", "--components", "3", "--warm-up", "2", "--weight-decay", "0.125")
    assert train(tmp_path, *BARE, *options, "--learning-rate", "0.5", "--prior-learning-rate", str(rate)) == 0
    for network, learned in rates:
        assert network[1] == 0.125
        assert learned == (network[0] * (rate or 0.5) / 0.5, 0.0)


class Clusters(nn.Module):
    """x [N, 1] in {0, 1, 2} -> posterior means 10 x in the first dimension, where the variance is 0.01; N(0, I) in the
    second, which carries nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.cat([10 * x, torch.zeros_like(x)], dim=1)
        return torch.cat([mean, torch.tensor([math.log(0.01), 0.0]).expand_as(mean)], dim=1)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_mixture_begins_at_the_clusters_as_wide_as_the_posteriors(covariance):
    x = torch.arange(3.0).repeat_interleave(100).view(300, 1)
    vae = VAE(Clusters(), nn.Linear(2, 1), (1,), (2,), "normal")
    source = Data("x", "", scaling("normal"), x, x, None, None, None)
    settings = Settings(prior="gmm", components=3, covariance=covariance, latent=2)
    found = []
    for _ in range(2):
        mixture = prior.build(settings, vae, source)
        prior.initialise(mixture, vae, source, settings, CPU)
        order = mixture.means[:, 0].argsort()
        assert torch.allclose(mixture.means[order], torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]]), atol=0.05)
        variances = mixture.scale_tril.square().sum(-1)
        assert torch.allclose(variances, torch.tensor([0.01, 1.0]).expand(3, 2), rtol=0.1)
        found.append(mixture.state_dict())
        torch.manual_seed(len(found))  # another state of torch's generator: the fit has its own
    for name in found[0].keys() - {"seed"}:
        assert found[0][name].equal(found[1][name])


def test_pseudo_inputs_are_data_and_stay_in_their_range():
    x = torch.rand(50, 1, 4, 4)
    source = Data("x", "", scaling("bernoulli"), x, x, None, None, None)
    settings = Settings(prior="vamp", components=60, hidden=8, latent=2)
    first, second = (prior.pseudo_inputs(settings, source) for _ in range(2))
    assert first.equal(second)
    assert first.shape == (60, 1, 4, 4)
    assert len(first[:50].unique(dim=0)) == 50
    beyond = torch.tensor([-0.5, 0.25, 1.5], requires_grad=True)
    inside = prior.into_range(source)(beyond)
    inside.sum().backward()
    assert inside.tolist() == [0.0, 0.25, 1.0]
    assert beyond.grad.tolist() == [1.0, 1.0, 1.0], "a pseudo-pixel at the border can come back"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prior": "gmm", "components": 0}, "--components must be at least 1"),
        ({"components": 5}, "--components belongs to --prior gmm or vamp; this run has --prior standard"),
        ({"prior": "flow", "components": 5}, "--components belongs to"),
        ({"prior": "vamp", "covariance": "full"}, "--covariance belongs to --prior gmm"),
        ({"kl": "upper"}, "--kl belongs to --prior gmm or vamp or flow"),
        ({"prior": "flow", "kl": "upper"}, "--kl upper needs a mixture"),
        ({"prior": "gmm", "kl": "upper", "samples": 2}, "--samples belongs to --kl mc"),
        ({"prior": "gmm", "samples": 0}, "--samples must be at least 1"),
        ({"prior": "gmm", "prior_learning_rate": math.nan}, "--prior-learning-rate must be a finite"),
        ({"warm_up": -1}, "--warm-up must be at least 0"),
    ],
)
def test_options_that_contradict_are_refused_by_name(given, expected):
    with pytest.raises(UserError, match=expected):
        resolve(given)


def test_defaults_of_a_learned_prior():
    assert (resolve({}).warm_up, resolve({}).name) == (0, "digits")
    assert (resolve({"prior": "gmm"}).warm_up, resolve({"prior": "gmm"}).name) == (500, "digits-gmm")
    assert resolve({"prior": "vamp", "data": "pbmc"}).warm_up < 480, "pbmc has 480 steps"
    assert resolve({"prior": "gmm", "preset": "large-latent"}).warm_up < 1000
    assert resolve({"prior": "gmm", "warm_up": 7}).warm_up == 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--warm-up", "12", "--prior", "gmm"), "--warm-up 12 leaves none of the 12 steps"),
        (("--prior", "gmm", "--components", "1439", *WARM), "--components 1439 is more than the 1438"),
        (("--prior", "flow", "--latent", "1025", *WARM), "--prior flow takes at most 1024 latent dimensions"),
        (
            ("--prior", "gmm", "--covariance", "full", "--latent", "1025", *WARM),
            "--covariance full takes at most 1024 latent dimensions",
        ),
    ],
)
def test_runs_that_cannot_be_end_in_one_line(tmp_path, capsys, options, expected):
    assert expected in refused(capsys, tmp_path / "run", *options)


def test_missing_zuko_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    assert "pip install zuko" in refused(capsys, tmp_path, "--prior", "flow", *WARM)


def test_another_prior_is_another_run(tmp_path, capsys):
    assert train(tmp_path, *BARE, *options_of("gmm")) == 0
    assert "--prior vamp differs from the run's gmm" in refused(capsys, tmp_path, "--resume", "--prior", "vamp")
    # Without --prior again: the options belong to the run that goes on.
    assert "--components 6 differs from the run's 5" in refused(capsys, tmp_path, "--resume", "--components", "6")
    assert train(tmp_path, *BARE, "--resume", "--components", "5") == 0
