"""Data left on the disk: the numbers do not depend on where the data are, on who reads them, or on an interruption."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkl.vae import checkpoint, data, loop, streams
from fastkl.vae import run as runs
from fastkl.vae.data.shards import Shards
from fastkl.vae.parallel import Ranks
from fastkl.vae.rules import resolve

from vae_helpers import (
    BARE,
    SMALL,
    assert_same,
    assert_same_state,
    cut_short,
    fork_each,
    interrupt,
    posix,
    refused,
    train,
    write_pictures,
)

AUGMENTED = ("--crop", "6", "--flip", "--batch-size", "16")


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


def options(folder: Path, *more: str) -> tuple[str, ...]:
    return (*BARE, "--data", str(folder), "--batch-size", "16", *more)


@pytest.mark.parametrize("kind", ["images", "resized images", "bytes", "standardised"])
def test_data_on_the_disk_give_the_weights_of_data_in_memory(tmp_path, pictures, kind):
    path, more = pictures, ("--image-size", "6") if kind == "resized images" else ()
    if "images" not in kind:
        path = tmp_path / "x.npy"
        values = np.random.default_rng(0).integers(0, 256, (50, 8, 8))
        np.save(path, values.astype(np.uint8) if kind == "bytes" else values / 7 - 3)
    states = []
    for own in ((), ("--stream",)):
        assert train(tmp_path / "-".join(("run", *own)), *options(path, *own, *more)) == 0
        states.append(checkpoint.load(tmp_path / "-".join(("run", *own)))["model"])
    assert_same(*states)


def test_workers_and_an_interruption_change_no_bit(tmp_path, monkeypatch, pictures):
    """Three steps are an epoch, so the run stops in the middle of the second."""
    chosen = options(pictures, *AUGMENTED)
    assert train(tmp_path / "whole", *chosen) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert train(tmp_path / "run", *chosen, "--workers", "2") == 130
    assert checkpoint.load(tmp_path / "run")["step"] == 5
    assert not multiprocessing.active_children(), "the workers end with the run"
    assert train(tmp_path / "run", *BARE, "--resume", "--workers", "1") == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert train(tmp_path / "plain", *options(pictures, "--crop", "6")) == 0
    plain, flipped = (checkpoint.load(tmp_path / name)["model"] for name in ("plain", "whole"))
    assert any(not plain[name].equal(flipped[name]) for name in plain)


@posix
def test_a_killed_run_with_workers_goes_on_at_once(tmp_path, pictures):
    """Its workers outlive it by some seconds, and must not keep the folder locked."""
    chosen, real = options(pictures, *AUGMENTED, "--workers", "2"), loop.batch

    def deadly(run):
        if run.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(run)

    pid = os.fork()
    if pid == 0:
        loop.batch = deadly
        os._exit(train(tmp_path / "killed", *chosen))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert train(tmp_path / "killed", *BARE, "--resume") == 0
    assert train(tmp_path / "whole", *chosen) == 0
    assert_same_state(tmp_path / "killed", tmp_path / "whole")


@posix
def test_signals_to_all_processes_end_the_run_after_its_step(tmp_path, monkeypatch, pictures):
    """Ctrl-C reaches the workers, and a scheduler sends SIGTERM to each process: they still read what the run needs."""
    real = loop.batch

    def signalled(run):
        if run.step == 5:
            for child in multiprocessing.active_children():
                for number in (signal.SIGINT, signal.SIGTERM):
                    os.kill(child.pid, number)
            signal.raise_signal(signal.SIGTERM)
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch", signalled)
        assert train(tmp_path / "run", *options(pictures, *AUGMENTED, "--workers", "2")) == 130
    assert checkpoint.load(tmp_path / "run")["step"] == 6
    assert train(tmp_path / "run", *BARE, "--resume") == 0
    assert train(tmp_path / "whole", *options(pictures, *AUGMENTED)) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


@posix
def test_a_worker_that_dies_loses_no_step(tmp_path, capsys, monkeypatch, pictures):
    """It dies while the weights are updated, which must not be interrupted."""
    real = loop.update

    def deadly(run, loss):
        if run.step == 5:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
                time.sleep(0.2)
        return real(run, loss)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", deadly)
        error = refused(capsys, tmp_path / "run", *options(pictures, *AUGMENTED, "--workers", "1"))
    assert "a process of --workers was killed" in error
    assert checkpoint.load(tmp_path / "run")["step"] >= 5, "a step that was read before is finished"
    assert train(tmp_path / "run", *BARE, "--resume", "--workers", "0") == 0
    assert train(tmp_path / "whole", *options(pictures, *AUGMENTED)) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_each_process_reads_its_own_rows_only(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((50, 3, 9, 9)))
    given = {"data": str(tmp_path / "x.npy"), "stream": True, "crop": 8, "flip": True}
    settings = resolve({"hidden": 16, "latent": 3, "steps": 9, "noise": "datum", "batch_size": 8, **given})
    run = dataclasses.replace(runs.start(settings, data.load(settings), Ranks(), Path()), step=7)
    x, _ = loop.batch(run)
    half, shares, rows = dataclasses.replace(settings, batch_size=4), [], []
    real = Shards.read
    monkeypatch.setattr(Shards, "read", lambda shards, asked: rows.append(asked) or real(shards, asked))
    monkeypatch.setattr(Ranks, "mean", lambda ranks, values: values)  # there is no group
    for rank in range(2):
        shares.append(loop.batch(dataclasses.replace(run, settings=half, ranks=Ranks(rank, 2)))[0])
    assert torch.cat(shares).equal(x)
    expected = run.data.train.rows[streams.batch_indices(settings.seed, 7, len(run.data.train), 8)]
    assert np.concatenate(rows).tolist() == expected.tolist()


def test_workers_need_data_outside_the_memory(tmp_path, capsys):
    assert "--workers needs data that are read while the model trains" in refused(
        capsys, tmp_path / "run", "--workers", "2"
    )
    assert "--data digits is read whole" in refused(capsys, tmp_path / "run", "--stream")


def late(pictures: Path, at_least: int, **settings) -> tuple[Path, int]:
    """(a training picture that is not read before this step of AUGMENTED, the step that reads it)."""
    loaded = data.load(resolve({"data": str(pictures), "crop": 6, "flip": True})).train
    count = len(loaded)
    # A start reads a few: for the fingerprint, and to measure the time of a step.
    read = {*np.linspace(0, count - 1, 32).astype(int).tolist(), *range(16)}
    for step in range(count // 16):
        for index in streams.batch_indices(0, step, count, 16).tolist():
            if step >= at_least and index not in read:
                return pictures / f"{loaded.rows[index]:03}.png", step
            read.add(index)
    raise AssertionError


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_is_cut_loses_no_step(tmp_path, capsys, workers):
    write_pictures(tmp_path / "pictures", 96)
    chosen, (damaged, step) = options(tmp_path / "pictures", *AUGMENTED), late(tmp_path / "pictures", 2)
    content = cut_short(damaged)
    error = refused(capsys, tmp_path / "run", *chosen, "--workers", workers)
    assert f"{damaged} is truncated" in error
    assert f"step {step} is saved: mend this, then continue with --resume" in error
    assert checkpoint.load(tmp_path / "run")["step"] == step
    assert f"{damaged} is truncated" in refused(capsys, tmp_path / "run", "--resume"), "again, and nothing is lost"
    damaged.write_bytes(content)
    assert train(tmp_path / "run", *BARE, "--resume") == 0
    assert train(tmp_path / "whole", *chosen) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")
def test_two_processes_train_as_one_and_stop_together_at_a_picture_that_one_cannot_read(tmp_path):
    write_pictures(tmp_path / "pictures", 96)
    damaged, step = late(tmp_path / "pictures", 2)
    write_pictures(tmp_path / "damaged", 96)
    cut_short(tmp_path / "damaged" / damaged.name)
    common = (*BARE, *SMALL, "--crop", "6", "--flip", "--noise", "datum")
    two = {name: (*common, "--data", str(tmp_path / name), "--batch-size", "8") for name in ("pictures", "damaged")}
    done = fork_each(tmp_path / "two", two)
    assert done.returncode != 0
    assert done.stderr.count(f"{damaged.name} is truncated") == 1, done.stderr
    assert checkpoint.load(tmp_path / "two" / "damaged")["step"] == step
    assert train(tmp_path / "one", *common, "--data", str(tmp_path / "pictures"), "--batch-size", "16") == 0
    one, both = (checkpoint.load(folder)["model"] for folder in (tmp_path / "one", tmp_path / "two" / "pictures"))
    torch.testing.assert_close(both, one, rtol=1e-3, atol=1e-4)
