"""Defaults that depend on the data and the model, and the estimate of a run's time."""

from __future__ import annotations

import dataclasses
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkl.vae import data, pace
from fastkl.vae import run as runs
from fastkl.vae.data import Data
from fastkl.vae.data.stored import Stored
from fastkl.vae.parallel import Ranks
from fastkl.vae.rules import resolve
from fastkl.vae.settings import Settings

from vae_helpers import BARE, refused, scaling, train


def sized(count: int, *shape: int) -> Data:
    """So many data, which take no memory."""
    values = torch.zeros(()).expand(count, *shape)
    return Data("x", "", scaling("bernoulli"), values[count // 5 :], values[: count // 5], None, None, None)


def suited(source: Data, **given) -> Settings:
    return pace.fit_defaults(resolve({"data": "x/", **given}), given, source)


def test_what_belongs_to_built_in_data_stays():
    assert pace.fit_defaults(resolve({}), {}, sized(1797, 1, 8, 8)) == Settings()
    for name, source in (("mnist5k", sized(5000, 1, 28, 28)), ("pbmc", sized(700, 765))):
        settings = resolve({"data": name})
        assert pace.fit_defaults(settings, {"data": name}, source) == settings


@pytest.mark.parametrize("count", [1_000, 10_000, 100_000])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_a_convolutional_run_takes_minutes_not_days(count, size):
    """Two cores do some 5 million pixels of 16 channels in a second: half an hour at most, or few steps."""
    source = sized(count, 3, size, size)
    settings = suited(source, model="conv")
    steps = settings.epochs * (len(source.train) // settings.batch_size)
    pixels = steps * settings.batch_size * size**2 * (settings.hidden / 16) ** 2
    assert pixels < 9e8 or settings.epochs == 1 or steps <= 2 * pace.LEAST_STEPS
    assert steps >= pace.LEAST_STEPS
    assert settings.hidden <= 32
    decoded = settings.importance_samples * len(source.test) * size**2
    assert decoded < 9e8 or settings.importance_samples == pace.LEAST_SAMPLES


def test_defaults_give_way_to_what_was_typed():
    given = {"model": "conv", "epochs": 7, "hidden": 48, "batch_size": 5, "importance_samples": 3, "threads": 2}
    settings = suited(sized(1000, 3, 64, 64), **given)
    assert {name: getattr(settings, name) for name in given} == given
    assert suited(sized(1000, 3, 64, 64), model="conv", steps=9).epochs == Settings.epochs


def test_defaults_never_lead_to_an_error(tmp_path, capsys):
    import numpy as np

    few = suited(sized(12, 7), prior="gmm", components=3)
    assert few.batch_size <= 10
    assert few.warm_up < few.epochs
    assert suited(sized(100, 3, 30, 30), model="conv").layers == 1
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((12, 7)))
    assert train(tmp_path / "few", *BARE, "--data", str(tmp_path / "x.npy")) == 0
    said = refused(capsys, tmp_path / "run", "--data", str(tmp_path / "x.npy"), "--batch-size", "64")
    assert "more than the 10 training data" in said


@pytest.mark.parametrize(
    "given", [{}, {"objective": "aae"}, {"prior": "gmm", "warm_up": 0}, {"model": "autoregressive"}]
)
def test_measuring_a_step_leaves_nothing_behind(given):
    settings = resolve({"hidden": 8, "latent": 3, "steps": 4, **given})
    run = runs.start(settings, data.load(settings), Ranks(), Path())
    before = {name: value.clone() for name, value in run.objective.state_dict().items()}
    assert pace.seconds_per_step(run) > 0
    assert all(parameter.grad is None for parameter in run.objective.parameters())
    assert all(value.equal(before[name]) for name, value in run.objective.state_dict().items())
    assert run.step == 0
    assert not run.window


def test_a_run_that_would_take_hours_says_what_to_change():
    source = dataclasses.replace(sized(10_000, 3, 64, 64), source="x/")
    settings = dataclasses.replace(suited(source, model="conv", epochs=150), importance_samples=1000)
    run = types.SimpleNamespace(
        settings=settings, data=source, step=0, total_steps=150 * 125, device=torch.device("cpu")
    )
    first, hint = pace.forecast(run, 10.0)
    # Steps; 25 times 1,000 held-out data at a third of a step's time each; 1,000 samples of 2,000 at a sixth.
    seconds = 18_750 * 10 + 25 * 1000 * 10 / 64 / 3 + 1000 * 2000 * 10 / 64 / 6
    assert first.startswith(f"about {seconds / 86400:.1f} days on the CPU")
    assert "--steps 120 takes 20 min" in hint
    for option in ("--importance-samples", "--hidden", "--image-size"):
        assert option in hint
    (short,) = pace.forecast(run, 1e-4)
    assert "18,750 steps of 0.1 ms" in short
    (bare,) = pace.forecast(run, 1e-4, reported=False)
    assert "samples" not in bare


def test_durations_have_the_precision_of_a_forecast():
    durations = {0.2: "1 s", 44: "44 s", 100: "1.7 min", 1200: "20 min", 7200: "2.0 h", 4e5: "4.6 days"}
    assert {seconds: pace.duration(seconds) for seconds in durations} == durations


def test_workers_read_ahead_for_a_gpu(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((20, 5)))
    given = {"data": str(tmp_path / "x.npy"), "stream": True}
    source = data.load(resolve(given))
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    for cuda, expected in ((False, 0), (True, 6)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert pace.fit_defaults(resolve(given), given, source, processes=2).workers == expected
    for more in ({"device": "cpu"}, {"workers": 0}):
        assert pace.fit_defaults(resolve({**given, **more}), {**given, **more}, source).workers == 0
    assert suited(sized(50, 5)).workers == 0, "data in memory need none"


def test_the_time_of_a_step_has_its_reading(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 5)))
    given = {"data": str(tmp_path / "x.npy"), "stream": True, "hidden": 8, "latent": 2, "batch_size": 8}
    run = runs.start(resolve(given), data.load(resolve(given)), Ranks(), tmp_path)
    real = Stored.view

    def slow(self, indices, epoch):
        time.sleep(0.3)
        return real(self, indices, epoch)

    monkeypatch.setattr(Stored, "view", slow)
    assert pace.seconds_per_step(run) > 0.3
    few = dataclasses.replace(run, settings=dataclasses.replace(run.settings, workers=1000))
    assert pace.seconds_per_step(few) < 0.3
