"""Training from Python: `fastkl.vae.train` with data, a model or an objective of your own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastkl import objectives, vae
from fastkl.vae import checkpoint, data, loop
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

from vae_helpers import assert_same_state, datasets, train

SMALL = {"hidden": 16, "latent": 3, "steps": 12, "log_every": 3, "checkpoint_every": 4}


def digits():
    bunch = datasets.load_digits()
    return bunch.images.astype(np.int64), bunch.target


def own_model(likelihood="bernoulli"):
    torch.manual_seed(5)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8))
    decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8)))
    return vae.VAE(encoder, decoder, (1, 8, 8), (4,), likelihood)


def test_a_model_may_have_its_name(tmp_path):
    model = vae.train(torch.rand(20, 1, 8, 8), out=tmp_path / "run", model="conv", layers=1, hidden=8, steps=1)
    assert model.latent_shape == (8, 4, 4)


def test_a_run_from_python_is_that_of_the_command_line(tmp_path):
    model = vae.train("digits", out=tmp_path / "python", **SMALL)
    assert train(tmp_path / "shell", "--no-report", "--no-tensorboard") == 0
    assert_same_state(tmp_path / "python", tmp_path / "shell")
    assert repr(model) == repr(vae.load(tmp_path / "shell"))


@pytest.mark.parametrize("kind", ["array", "tensor", "pair", "dictionary"])
def test_data_may_be_arrays(tmp_path, kind):
    x, y = digits()
    given = {"array": x, "tensor": torch.from_numpy(x), "pair": (x, y), "dictionary": {"x": x, "x_test": x[:50]}}[kind]
    model = vae.train(given, out=tmp_path / kind, **SMALL)
    assert model.encode(x[:5]).shape == (5, 3)
    assert 0 < model.decode(model.encode(x[:5])).max() <= 16
    if kind != "dictionary":  # the same numbers in the same order
        vae.train("digits", out=tmp_path / "digits", **SMALL)
        torch.testing.assert_close(
            checkpoint.load(tmp_path / kind)["model"], checkpoint.load(tmp_path / "digits")["model"], rtol=0, atol=0
        )


def test_a_model_of_ones_own_is_trained_resumed_and_loaded(tmp_path, monkeypatch):
    x, _ = digits()
    whole = vae.train(x, out=tmp_path / "whole", model=own_model(), **SMALL)
    log = loop.log
    with monkeypatch.context() as patch:
        patch.setattr(loop, "log", lambda run, *rest: log(run, *rest) or run.step == 5)
        half = vae.train(x, out=tmp_path / "run", model=own_model(), **SMALL)
    assert half.step == 5, "a stop gives the model so far"
    again = vae.train(x, out=tmp_path / "run", model=own_model(), resume=True)
    assert again.step == 12
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    torch.testing.assert_close(again.encode(x[:9]), whole.encode(x[:9]), rtol=0, atol=0)
    fresh = own_model()
    loaded = vae.load(tmp_path / "run", model=fresh)
    torch.testing.assert_close(loaded.encode(x[:9]), whole.encode(x[:9]), rtol=0, atol=0)
    assert fresh.encoder[1].weight.requires_grad, "the given model is left as it is"
    with pytest.raises(UserError, match="this run has a model of its own, which cannot be rebuilt: give it by model="):
        vae.load(tmp_path / "run")


def test_an_objective_of_ones_own(tmp_path):
    seen = []

    def objective(posterior, prior, log_likelihood):
        z, kl = posterior.rsample_kl()
        reconstruction = log_likelihood(z).mean()
        seen.append(prior)
        terms = {"kl": kl.mean(), "reconstruction": reconstruction, "twice": 2 * kl.mean()}
        return objectives.Loss(2 * kl.mean() - reconstruction, terms)

    vae.train(digits()[0], out=tmp_path / "own", objective=objective, **SMALL)
    state = checkpoint.load(tmp_path / "own")
    assert seen == [None] * 12
    assert len(state["history"]["terms/twice"]) == 4
    vae.train(digits()[0], out=tmp_path / "same", objective="beta_vae", beta=2.0, **SMALL)
    torch.testing.assert_close(state["model"], checkpoint.load(tmp_path / "same")["model"])


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "unknown option 'step'; did you mean 'steps'?", {"step": 3}),
        (TypeError, "steps must be of type int, got 1.5", {"steps": 1.5}),
        (TypeError, "steps must be of type int, got True", {"steps": True}),
        (TypeError, "compile must be of type bool, got 1", {"compile": 1}),
        (UserError, "prior must be one of 'standard'", {"prior": "normal"}),
        (UserError, "--ema must be a decay", {"ema": 1.0}),
        (UserError, r"model= is for data of shape \[1, 8, 8\] with a normal likelihood", {"model": "normal"}),
        (UserError, r"--data \(an array\): expected numbers, got dtype <U1", {"data": np.array(["a"] * 20)}),
        (UserError, r"--data \(an array\): at least 10 rows are needed", {"data": np.zeros((5, 6))}),
        (UserError, "data must be an array, a pair", {"data": (np.zeros(3),) * 3}),
    ],
)
def test_wrong_arguments_are_named(tmp_path, error, message, options):
    options = {"data": digits()[0], **options}
    if options.get("model") == "normal":
        options["model"] = own_model("normal")
    with pytest.raises(error, match=message.replace("?", r"\?")):
        vae.train(out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists(), "nothing is left"


def test_a_mapping_of_a_file_stays_on_the_disk(tmp_path):
    """And its crops and flips are those of the file."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (90, 1, 9, 9)).astype(np.uint8))
    mapping = np.load(tmp_path / "x.npy", mmap_mode="r")
    options = {**SMALL, "stream": True, "crop": 8, "flip": True, "batch_size": 16}
    vae.train(mapping, out=tmp_path / "mapping", **options)
    vae.train(tmp_path / "x.npy", out=tmp_path / "file", workers=1, **options)
    one, other = (checkpoint.load(tmp_path / name)["model"] for name in ("mapping", "file"))
    assert all(one[name].equal(other[name]) for name in one)
    source = data.load(Settings(stream=True), mapping).train.source
    assert np.shares_memory(source, mapping)
