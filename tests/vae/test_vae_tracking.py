"""`--wandb` sends what TensorBoard gets to Weights & Biases, and a resumed run goes on as the same run there."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import numpy as np
import pytest

from fastkl.vae.settings import Settings

from vae_helpers import BARE, refused, train


@pytest.fixture
def wandb(monkeypatch):
    """A module in place of wandb that keeps its calls."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.begun, module.logged, module.ended = [], [], []

    class Run:
        def log(self, values, step):
            module.logged.append((step, values))

        def finish(self, exit_code):
            module.ended.append(exit_code)

    def init(**given):
        module.begun.append(given)
        return Run()

    module.init, module.Image = init, lambda pixels: pixels
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_what_tensorboard_gets(tmp_path, wandb):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(tmp_path, "--no-report", "--wandb", "digits") == 0
    given = wandb.begun[0]
    assert (given["project"], given["dir"], given["resume"]) == ("digits", str(tmp_path), "allow")
    assert given["config"]["hidden"] == 16
    assert given["config"].keys() == Settings().__dict__.keys()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    pictures = ("original", "reconstruction", "sample")
    found = {(name, step): value for step, row in wandb.logged for name, value in row.items() if name not in pictures}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6)
    drawn = {name: value for _, row in wandb.logged for name, value in row.items() if name in pictures}
    assert drawn.keys() == set(pictures)
    assert {(len(batch), batch[0].shape, batch[0].dtype) for batch in drawn.values()} == {(16, (8, 8), np.dtype("u1"))}
    assert max(one.max() for one in drawn["original"]) == 255
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps), "wandb ignores a step before the last one"
    assert wandb.ended == [0]


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, wandb):
    options = (*BARE, "--schedule", "constant", "--wandb", "digits")
    assert train(tmp_path / "run", *options) == 0
    assert train(tmp_path / "run", *options, "--resume", "--steps", "16") == 0
    assert train(tmp_path / "other", *options) == 0
    first, second, other = (given["id"] for given in wandb.begun)
    assert first == second != other
    assert [step for step, row in wandb.logged if "train/elbo" in row] == [3, 6, 9, 12, 15, 16, 3, 6, 9, 12]


def test_a_run_that_fails_is_marked_as_failed(tmp_path, wandb, monkeypatch):
    from fastkl.vae import loop

    monkeypatch.setattr(loop, "test", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, *BARE, "--wandb", "digits")
    assert wandb.ended == [1]


def test_wandb_that_is_missing_or_refuses_is_said_in_one_line(tmp_path, capsys, monkeypatch, wandb):
    def init(**given):
        raise RuntimeError("no API key\nconfigured")

    wandb.init = init
    error = refused(capsys, tmp_path / "run", "--wandb", "digits")
    assert "--wandb digits: no API key; WANDB_MODE=offline needs no network" in error
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(capsys, tmp_path / "run2", "--wandb", "digits")
    assert "--wandb needs wandb, which is not installed: pip install wandb" in error
