"""Checkpoints: whatever goes wrong, the last good one is untouched, and the reason is said in one line."""

from __future__ import annotations

import errno
import math
import os
import pickle

import pytest
import torch

from fastkl.vae import checkpoint, loop
from fastkl.vae.cli import main
from fastkl.vae.errors import UserError

from vae_helpers import BARE, assert_same, command, refused, run, train

FILE = checkpoint.NAME


@pytest.fixture
def good(tmp_path, capsys):
    """A run folder that holds a checkpoint at step 12."""
    assert train(tmp_path / "run", *BARE, "--schedule", "constant") == 0
    capsys.readouterr()
    return tmp_path / "run"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_last_checkpoint(good, capsys, monkeypatch, call):
    before = (good / FILE).read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    assert "the disk is full" in refused(capsys, good, "--resume", "--steps", "16")
    assert (good / FILE).read_bytes() == before
    left = sorted(item.name for item in good.iterdir())
    assert left == [FILE, "run.json", "settings.json"], "a half-written file was left behind"


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_file_that_cannot_grow_keeps_the_last_checkpoint(good, capsys):
    """Not a pretended error: the system itself refuses to write more than 4 kB to a file."""
    import resource

    before = (good / FILE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        error = refused(capsys, good, "--resume", "--steps", "16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert FILE in error
    assert (good / FILE).read_bytes() == before
    assert train(good, *BARE, "--resume", "--schedule", "constant", "--steps", "16") == 0


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_full_disk_ends_without_a_traceback_with_tensorboard_too(good):
    limit = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from fastkl.vae.cli import main"
    )
    options = ["train", "--out", str(good), "--resume", "--steps", "16"]
    done = run([command()[0], "-c", f"{limit}; sys.exit(main({options!r}))"])
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.load(good)["step"] == 12


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "pickle", "tensor", "older", "another shape"])
def test_damaged_checkpoint_is_refused(good, capsys, damage, tmp_path):
    path, trap = good / FILE, tmp_path / "trap"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(b"this is a letter, not a checkpoint" * 50)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Trap(str(trap)), protocol=2))
    elif damage == "tensor":
        torch.save(torch.zeros(3), path)
    elif damage == "older":
        torch.save({**checkpoint.load(good), "format": "fastkl.vae 1"}, path)
    else:
        state = checkpoint.load(good)
        state["model"]["encoder.1.weight"] = torch.zeros(2, 2)
        checkpoint.save(good, state)
    left = path.read_bytes()
    error = refused(capsys, good, "--resume")
    assert "checkpoint" in error
    assert path.read_bytes() == left, "a damaged file is evidence; it is not for the run to remove"
    assert not trap.exists(), "code from the checkpoint was run"


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_unwritable_folder_is_found_before_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "the folder is not writable" in refused(capsys, tmp_path / "file" / "run")
    if os.name == "posix" and os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "the folder is not writable" in refused(capsys, tmp_path / "closed" / "run")


def test_a_run_is_not_overwritten(good, capsys):
    assert "holds a run" in refused(capsys, good)


def spoil(monkeypatch, first, last, what):
    """From step `first` to `last` the weights, or a gradient, are not finite."""
    real = loop.batch

    def spoiling(run):
        parameter = next(run.vae.parameters())
        if first <= run.step < last:
            if what == "weights":
                parameter.data.fill_(float("nan"))
            else:
                hook = parameter.register_hook(lambda gradient: (hook.remove(), gradient * float("nan"))[1])
        return real(run)

    monkeypatch.setattr(loop, "batch", spoiling)


def test_weights_that_are_not_finite_never_reach_the_checkpoint(good, capsys, monkeypatch):
    before = (good / FILE).read_bytes()
    spoil(monkeypatch, 15, 16, "weights")  # the last step: no later loss could tell
    assert "the weights are not finite" in refused(capsys, good, "--resume", "--steps", "16")
    assert (good / FILE).read_bytes() == before


def test_bad_steps_are_skipped_and_counted(good, capsys, monkeypatch):
    before = checkpoint.load(good)
    spoil(monkeypatch, 12, 16, "gradients")
    assert train(good, "--resume", "--steps", "16", *BARE) == 0
    assert "4 skipped" in capsys.readouterr().out, "also after an epoch without a good step"
    state = checkpoint.load(good)
    assert state["step"] == 16
    assert state["guard"] == {"skipped": 4, "in_a_row": 4}
    assert_same(state["model"], before["model"])
    assert_same(state["optimizers"]["autoencoder"]["state"], before["optimizers"]["autoencoder"]["state"])
    assert [row[0] for row in state["history"]["train"]] == [row[0] for row in before["history"]["train"]]


def test_too_many_bad_steps_in_a_row_stop_the_run(good, capsys, monkeypatch):
    before = (good / FILE).read_bytes()
    spoil(monkeypatch, 12, 99, "gradients")
    error = refused(capsys, good, "--resume", "--steps", "99", "--bad-steps", "3")
    assert "a gradient was not finite 3 times in a row, the last at step 15: try a smaller --learning-rate" in error
    assert (good / FILE).read_bytes() == before, "the last good one is kept"


def test_write_replaces_in_one_step(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    checkpoint.write(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(UserError, match="the old file is unchanged"):
        checkpoint.write(tmp_path / "missing" / "x", b"new")


def test_a_batch_of_nan_costs_one_step(good, monkeypatch):
    real = loop.batch

    def spoiled(run):
        x, noise = real(run)
        return (x * float("nan") if run.step == 13 else x), noise

    monkeypatch.setattr(loop, "batch", spoiled)
    assert train(good, "--resume", "--steps", "16", *BARE) == 0
    state = checkpoint.load(good)
    assert state["guard"] == {"skipped": 1, "in_a_row": 0}
    assert all(value.isfinite().all() for value in state["model"].values())
    moments = [each for one in state["optimizers"]["autoencoder"]["state"].values() for each in one.values()]
    assert all(torch.as_tensor(value).isfinite().all() for value in moments)
    assert all(math.isfinite(number) for rows in state["history"].values() for row in rows for number in row)


def test_a_disk_that_is_full_at_the_report_costs_the_report_alone(good, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    before = (good / FILE).read_bytes()
    real = os.replace

    def full(source, target):
        if str(target).endswith("report.html"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    capsys.readouterr()
    assert main(["report", str(good)]) == 2
    error = capsys.readouterr().err
    assert "report.html cannot be written: the disk is full; the old file is unchanged" in error
    assert error.count("\n") == 1
    assert (good / FILE).read_bytes() == before
    assert not list(good.rglob("*.tmp"))
