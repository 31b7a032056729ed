"""What the tests of the reference VAE share: a small run, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fastkl
from fastkl.vae import checkpoint
from fastkl.vae.cli import main

# A run of a second or so: every part of the loop is reached, nothing is learned well.
SMALL = ("--hidden", "16", "--latent", "3", "--steps", "12", "--log-every", "3", "--checkpoint-every", "4")
BARE = ("--no-report", "--no-tensorboard")


def train(folder: Path, *options: str) -> int:
    """The exit code of `fastkl train` on a small model."""
    return main(["train", "--out", str(folder), *SMALL, *options])


def refused(capsys, folder: Path, *options: str) -> str:
    """The one line that a run ends with when it refuses to go on: no traceback, exit code 2."""
    capsys.readouterr()
    code = train(folder, *BARE, *options)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("fastkl: ")
    assert error.count("\n") == 1, error
    return error


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "fastkl.vae", "train", *options]


def environment() -> dict[str, str]:
    """Subprocesses find this very fastkl, installed or not, and do not fight over two cores."""
    paths = [str(Path(fastkl.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], timeout: int = 120) -> subprocess.CompletedProcess:
    options = {"env": environment(), "cwd": tempfile.gettempdir(), "timeout": timeout}
    return subprocess.run(arguments, capture_output=True, text=True, check=False, **options)


def assert_same_state(one: Path, other: Path) -> None:
    """Weights, optimiser, step and curves of two run folders, bit for bit; the time it took may differ."""
    first, second = (without_time(checkpoint.load(folder)) for folder in (one, other))
    assert first["step"] == second["step"]
    assert first["history"] == second["history"]
    assert_same(first, second)


def without_time(state: dict) -> dict:
    return {name: value for name, value in state.items() if name not in ("seconds", "settings")}


def assert_same(first, second, where: str = "checkpoint") -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        # NaN would be unequal to itself, and -0.0 equal to 0.0: compare the bits.
        assert first.numpy().tobytes() == second.numpy().tobytes(), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for index, (left, right) in enumerate(zip(first, second)):
            assert_same(left, right, f"{where}[{index}]")
    else:
        assert first == second, where
