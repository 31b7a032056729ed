"""`--perceptual module:function`: a distance between images of the user's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastkl.vae import checkpoint

from vae_helpers import BARE, refused, train

MODULE = """
import os

import torch
from torch import nn

SEEN = []

def blurred(x_hat, x):
    SEEN.append((x_hat.detach(), x))
    return (x_hat - x).square().flatten(1).mean(1)

def of_lpips(x_hat, x):
    return blurred(x_hat, x).view(-1, 1, 1, 1)

def without_gradient(x_hat, x):
    with torch.no_grad():
        return blurred(x_hat, x)

class Trap(nn.Module):
    '''A network with weights of its own behind features without gradient.'''

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x_hat, x):
        return (x_hat.detach() - x).square().flatten(1) @ self.weight

trap, linear = Trap(), nn.Linear(64, 4)

class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    def forward(self, x_hat, x):
        return (self.net(x_hat) - self.net(x)).square().sum(1)

features = Features()

def one_number(x_hat, x):
    return blurred(x_hat, x).mean()

def fails(x_hat, x):
    raise ValueError("no such layer")

def without_its_file(x_hat, x):
    return blurred(x_hat, torch.load("weights.pth"))

def fails_later(x_hat, x):
    if len(SEEN) > 6 and not os.path.exists("mended"):
        raise RuntimeError("no memory")
    return blurred(x_hat, x)

def infinite(x_hat, x):
    return blurred(x_hat, x) / 0

number = 3
"""
IMAGES = ("--model", "conv", "--layers", "1", "--likelihood", "laplace", "--schedule", "constant", *BARE,
          "--test-count", "20", "--batch-size", "16")  # fmt: skip
names = (f"distances_{index}" for index in itertools.count())


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a fresh module in the current folder."""
    monkeypatch.chdir(tmp_path)
    name = next(names)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend("")  # undone after the test
    return name


def curve(folder, name="terms/perceptual"):
    return [row[1] for row in checkpoint.load(folder)["history"][name]]


@pytest.mark.parametrize("function", ["blurred", "features"])
def test_a_distance_from_the_current_folder_is_learned(tmp_path, module, function):
    """Its weight reaches the loss; a network's own weights are constants, and in no checkpoint."""
    options = (*IMAGES, "--perceptual", f"{module}:{function}", "--steps", "20", "--learning-rate", "0.02")
    for weight in ("0", "10000"):
        assert train(tmp_path / weight, *options, "--perceptual-weight", weight) == 0
    without, much = (curve(tmp_path / weight) for weight in ("0", "10000"))
    assert much[-1] < 0.9 * without[-1]
    assert not [name for name in checkpoint.load(tmp_path / "10000")["model"] if "net" in name]


def test_a_distance_sees_images_in_minus_one_to_one(tmp_path, module):
    import importlib

    assert train(tmp_path / "run", *IMAGES, "--perceptual", f"{module}:of_lpips", "--steps", "2") == 0
    x_hat, x = importlib.import_module(module).SEEN[-1]
    assert x.shape == x_hat.shape == (16, 1, 8, 8)
    assert (x.min(), x.max()) == (-1, 1)
    torch.testing.assert_close(8 * (x + 1), (8 * (x + 1)).round(), msg="the 17 grey levels of the digits")


def test_stopped_runs_go_on_bit_for_bit(tmp_path, module):
    options = (*IMAGES, "--perceptual", f"{module}:blurred", "--precision", "bf16")
    assert train(tmp_path / "whole", *options, "--steps", "6") == 0
    assert train(tmp_path / "parts", *options, "--steps", "3") == 0
    assert train(tmp_path / "parts", *options, "--steps", "6", "--resume") == 0
    whole, parts = (checkpoint.load(tmp_path / name)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_a_distance_that_fails_later_loses_no_step(tmp_path, capsys, module):
    options = (*IMAGES, "--perceptual", f"{module}:fails_later")
    said = refused(capsys, tmp_path / "run", *options, "--steps", "12")
    assert "fails_later failed: RuntimeError: no memory; step " in said
    assert "is saved: mend this, then continue with --resume" in said
    assert 0 < checkpoint.load(tmp_path / "run")["step"] < 12
    (tmp_path / "mended").touch()
    assert train(tmp_path / "run", "--resume", "--steps", "12", *BARE) == 0
    assert train(tmp_path / "whole", *options, "--steps", "12") == 0
    whole, parts = (checkpoint.load(tmp_path / name)["model"] for name in ("whole", "run"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("without_gradient", "the reconstruction, its first argument: does it run under torch.no_grad, or detach?"),
        ("trap", "has no gradient in the reconstruction, its first argument"),
        ("one_number", r"must return a value for each image, [2], got []"),
        ("fails", "failed: ValueError: no such layer"),
        ("linear", "failed: TypeError"),
        ("without_its_file", "failed: FileNotFoundError: [Errno 2] No such file or directory: 'weights.pth'"),
        ("infinite", "is not finite for two random images: [inf, inf]"),
        ("number", "must be a function, got int"),
        ("nothing", "cannot be imported: AttributeError"),
        ("", "expected module:function"),
    ],
)  # fmt: skip
def test_a_distance_that_would_train_nothing_is_refused(tmp_path, capsys, module, name, expected):
    said = refused(capsys, tmp_path / "run", *IMAGES, "--perceptual", f"{module}:{name}")
    assert f"--perceptual {module}:{name}" in said
    assert expected in said


def test_a_module_that_is_not_there_and_data_that_are_no_images_are_refused(tmp_path, capsys, module):
    said = refused(capsys, tmp_path / "run", *IMAGES, "--perceptual", "nobody_has_this:distance")
    assert "cannot be imported: ModuleNotFoundError: No module named 'nobody_has_this'" in said
    torch.save(torch.randn(20, 6), tmp_path / "x.pt")
    options = ("--data", "x.pt", "--perceptual", f"{module}:blurred")
    assert "--perceptual needs images, but a datum has shape [6]" in refused(capsys, tmp_path / "run", *options)
    assert "--perceptual-weight belongs to --perceptual" in refused(capsys, tmp_path, "--perceptual-weight", "2")
