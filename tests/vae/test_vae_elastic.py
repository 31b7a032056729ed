"""A run goes on with another number of processes, and after the death of one."""

from __future__ import annotations

import os
import random

import pytest
import torch

from fastkl.vae import checkpoint
from fastkl.vae.cli import main
from fastkl.vae.rules import fixed_processes, resolve

from vae_helpers import BARE, assert_same_state, ranks, refused, torchrun, train

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
COMMON = ("--hidden", "16", "--latent", "3", "--log-every", "1", "--schedule", "constant", *BARE)
# 3 processes do not divide 50 data, nor does --accumulate.
FREE = (*COMMON, "--global-batch-size", "50", "--accumulate", "4", "--noise", "datum")
FREE += ("--objective", "wae_mmd", "--prior", "gmm", "--components", "3", "--warm-up", "3")


STEPS = ("--steps", "40", "--checkpoint-every", "7", "--ema", "0.9")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run on 1, 2, 4 and 3 processes in turn, and an undisturbed one on 2."""
    folder = tmp_path_factory.mktemp("elastic")
    free = ("--out", str(folder / "many"), *FREE)
    starts = [(size, (*free, "--resume", "--steps", stop)) for size, stop in ((2, "7"), (4, "9"), (3, "12"))]
    whole = (2, ("--out", str(folder / "whole"), *COMMON, *STEPS))
    done = ranks((1, (*free, "--steps", "5")), *starts, whole)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_goes_on_with_other_numbers_of_processes(many, tmp_path):
    """1, 2, 4 and 3 processes in turn have the curve of one, within rounding."""
    assert train(tmp_path, *FREE, "--steps", "12") == 0
    found, expected = (checkpoint.load(folder) for folder in (many / "many", tmp_path))
    curves = [torch.tensor(state["history"]["train"], dtype=torch.float64) for state in (found, expected)]
    assert [row[0] for row in curves[0].tolist()] == list(range(1, 13))
    torch.testing.assert_close(*curves, rtol=5e-6, atol=1e-5)
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-3, atol=1e-4)


def test_the_number_of_processes_is_free_only_if_nothing_depends_on_it():
    free = {"global_batch_size": 50, "noise": "datum"}
    assert fixed_processes(resolve(free)) == ""
    assert "only --global-batch-size" in fixed_processes(resolve({"noise": "datum"}))
    assert "only --noise datum" in fixed_processes(resolve({"global_batch_size": 50}))
    assert "--objective swae" in fixed_processes(resolve({**free, "objective": "swae"}))


def test_the_size_of_a_step_is_refused_by_its_own_name(tmp_path, capsys):
    error = refused(capsys, tmp_path, "--global-batch-size", "9999")
    assert "--global-batch-size 9999 on 1 processes is more than the" in error
    error = refused(capsys, tmp_path, "--global-batch-size", "2", "--accumulate", "3")
    assert "--global-batch-size 2 with --accumulate 3 on 1 processes leaves a process without data" in error
    assert "exclude each other" in refused(capsys, tmp_path, "--global-batch-size", "8", "--batch-size", "8")


def test_a_process_that_dies_loses_nothing(many, tmp_path, monkeypatch):
    """One of two processes is killed at random steps. torchrun repeats its command, and the run ends as undisturbed."""
    kills = sorted(random.sample(range(1, 40), int(os.environ.get("FASTKL_DEATHS", "2"))))
    monkeypatch.setenv("FASTKL_KILLS", " ".join(f"{random.randrange(2)}:{step}" for step in kills))
    done = torchrun("--out", str(tmp_path / "killed"), *COMMON, *STEPS, restarts=len(kills))
    assert done.returncode == 0, done.stderr
    again = [done.stdout.count(line) for line in ("going on at step", "no checkpoint yet, from the beginning")]
    assert sum(again) == len(kills), done.stdout
    assert_same_state(tmp_path / "killed", many / "whole")


def test_a_repeated_command_starts_a_run_or_continues_it(tmp_path, capsys, monkeypatch):
    options = (*BARE, "--schedule", "constant")
    assert train(tmp_path / "run", *options, "--resume-if-begun", "--steps", "4") == 0
    assert train(tmp_path / "run", *options, "--resume-if-begun", "--steps", "8") == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(tmp_path / "run", *options, "--steps", "12") == 0
    assert "going on at step 8 of 12" in capsys.readouterr().out
    assert train(tmp_path / "whole", *options, "--steps", "12") == 0, "killed before the run had a folder"
    found, expected = (checkpoint.load(tmp_path / name)["model"] for name in ("run", "whole"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_repeated_command_names_its_folder(capsys, monkeypatch):
    assert main(["train", "--resume-if-begun"]) == 2
    assert "--resume-if-begun needs --out" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(["train"]) == 2
    assert "--max-restarts of torchrun needs --out" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert main(["train"]) == 2
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
