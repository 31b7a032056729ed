"""Shared by the tests of the reference VAE: a small run, in this process or another."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributions, nn

import fastkl
from fastkl.vae import checkpoint, loop
from fastkl.vae.cli import main
from fastkl.vae.data.scaling import Scaling
from fastkl.vae.model import VAE

# What a run trains on, unless it is told. Read once: it is a third of the time of a small run.
datasets = pytest.importorskip("sklearn.datasets")
datasets.load_digits = functools.cache(datasets.load_digits)

# A run of a second or so: every part of the loop is reached, nothing is learned well.
SMALL = ("--hidden", "16", "--latent", "3", "--steps", "12", "--log-every", "3", "--checkpoint-every", "4")
BARE = ("--no-report", "--no-tensorboard")
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and kill")


def interrupt(monkeypatch, at: int) -> None:
    real = loop.save_if_due

    def stopping(run, display, asked):
        return real(run, display, asked or run.step == at)

    monkeypatch.setattr(loop, "save_if_due", stopping)
    log = loop.log
    monkeypatch.setattr(loop, "log", lambda run, *rest: log(run, *rest) or run.step == at)


def train(folder: Path, *options: str) -> int:
    """The exit code of `fastkl train` on a small model."""
    return main(["train", "--out", str(folder), *SMALL, *options])


def refused(capsys, folder: Path, *options: str) -> str:
    """The one-line error of a refused run: no traceback, exit code 2."""
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
    own = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # the latter for restarts
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **own}


def run(arguments: list[str], timeout: int = 120) -> subprocess.CompletedProcess:
    options = {"env": environment(), "cwd": tempfile.gettempdir(), "timeout": timeout}
    return subprocess.run(arguments, capture_output=True, text=True, check=False, **options)


def scaling(likelihood: str) -> Scaling:
    """The map that changes no number."""
    return Scaling(likelihood, np.zeros(()), np.ones(()))


WORKER = str(Path(__file__).with_name("vae_worker.py"))


def torchrun(*options: str, restarts: int = 0) -> subprocess.CompletedProcess:
    """Two processes train together; see vae_worker.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", "0.05"]
    return run([sys.executable, *launcher, WORKER, "train", *options], timeout=60 + 240 * (restarts + 1))


def fork_each(folder: Path, runs: dict[str, tuple[str, ...]]) -> subprocess.CompletedProcess:
    """Two processes as of torchrun, but forked, and one run after the other, each in its own place in the folder:
    starting processes takes longer than a run."""
    commands = [["--out", str(folder / name), *options] for name, options in runs.items()]
    words = [word for command in commands for word in (*command, "then", "train")]
    return run([sys.executable, WORKER, "train", *words[:-2]], timeout=300)


def ranks(*runs: tuple[int | str, tuple[str, ...]]) -> subprocess.CompletedProcess:
    """Runs of so many processes with these options, one after the other; see vae_ranks.py."""
    commands = [(str(size), *(() if options[0] == "own" else ("train",)), *options, "then") for size, options in runs]
    words = [word for command in commands for word in command]
    return run([sys.executable, str(Path(__file__).with_name("vae_ranks.py")), *words[:-1]], timeout=300)


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


def linear_gaussian(features: int = 5, latent: int = 2) -> tuple[VAE, torch.Tensor, distributions.Distribution]:
    """x = W z + b + 0.7 noise, so p(x) is normal; the encoder is near the true posterior, but not it."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(features, latent, generator=generator), torch.randn(features, generator=generator)
    decoder, encoder = nn.Linear(latent, features), nn.Linear(features, 2 * latent)
    precision = torch.eye(latent) + weight.T @ weight / 0.49
    mean = torch.linalg.solve(precision, weight.T / 0.49)
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        encoder.weight.copy_(torch.cat([mean, torch.zeros_like(mean)]))
        encoder.bias.copy_(torch.cat([-mean @ bias, -precision.diagonal().log() + 0.2]))
    vae = VAE(encoder, decoder, (features,), (latent,), "normal")
    nn.init.constant_(vae.observation.logvar, math.log(0.49))
    marginal = distributions.MultivariateNormal(bias, weight @ weight.T + 0.49 * torch.eye(features))
    return vae, marginal.sample((40,)), marginal


def write_pictures(folder: Path, count: int = 48, size: tuple[int, int] = (8, 8), seed: int = 0) -> np.ndarray:
    """Colour pictures of random bytes, as PNG files; returns them, [count, height, width, 3]."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)
    for index, picture in enumerate(pixels):
        image.fromarray(picture).save(folder / f"{index:03}.png")
    return pixels


def cut_short(path: Path) -> bytes:
    """Cut a picture after its header; returns its old content."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 40])
    return content
