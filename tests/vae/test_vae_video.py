"""Videos [N, C, T, H, W]: read, encoded to a latent with time, shown frame by frame, and scored over all values."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from fastkl import vae
from fastkl.vae import data, events
from fastkl.vae.data import scaling
from fastkl.vae.errors import UserError
from fastkl.vae.model import build
from fastkl.vae.rules import resolve

from vae_helpers import refused, train

COUNT = 40


def clips(channels: int = 1, frames: int = 4, side: int = 8) -> np.ndarray:
    """Bytes [N, C, T, H, W]: a square that moves by a pixel each frame."""
    random = np.random.default_rng(0)
    found = np.zeros((COUNT, channels, frames, side, side), np.uint8)
    for clip in found:
        row, column = random.integers(0, side - frames, 2)
        for time in range(frames):
            clip[:, time, row : row + 3, column + time : column + time + 3] = 255
    return found


@pytest.mark.parametrize(
    ("axes", "note"), [((0, 1, 2, 3, 4), ""), ((0, 2, 3, 4, 1), "last"), ((0, 2, 1, 3, 4), "after the frames")]
)
def test_the_channels_of_a_video_are_found(tmp_path, axes, note):
    values = clips(3, 6, 9)
    np.save(tmp_path / "x.npy", values.transpose(axes))
    found = data.load(resolve({"data": str(tmp_path / "x.npy")}))
    assert found.shape == (3, 6, 9, 9)
    rows = torch.cat([found.train, found.test]).flatten(1)
    assert {row.numpy().tobytes() for row in rows} == {(clip / np.float32(255)).tobytes() for clip in values}
    assert ("channels" in found.note) == bool(note)
    assert note in found.note


@pytest.mark.parametrize("shape", [(COUNT, 3, 8, 8, 3), (COUNT, 8, 8, 8, 8)])
def test_a_video_with_ambiguous_channels_is_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random(shape))
    with pytest.raises(UserError, match=r"is ambiguous; save \[N, C, T, H, W\]"):
        data.load(resolve({"data": str(tmp_path / "x.npy")}))


def test_each_frame_is_resized_as_an_image():
    video = torch.rand(2, 3, 5, 8, 8)
    found = scaling.resized(video, 4)
    for time in range(5):
        torch.testing.assert_close(found[:, :, time], scaling.resized(video[:, :, time], 4), rtol=0, atol=0)


@pytest.mark.parametrize("model", ["conv", "mlp"])
def test_kl_and_likelihood_are_over_all_values(model):
    settings = resolve({"model": model, "latent": 2, "hidden": 8, "layers": 1})
    network = build(settings, (1, 4, 8, 8), "bernoulli").double()
    assert network.latent_shape == ((2, 2, 4, 4) if model == "conv" else (2,))
    x = torch.rand(3, 1, 4, 8, 8, dtype=torch.float64)
    q = network.posterior(x)
    z, kl = q.rsample_kl()
    mu, logvar = q.mean, q.logvar
    torch.testing.assert_close(kl, (logvar.exp() + mu**2 - 1 - logvar).flatten(1).sum(1) / 2)
    logits = network.decode(z)
    expected = x * torch.nn.functional.logsigmoid(logits) + (1 - x) * torch.nn.functional.logsigmoid(-logits)
    torch.testing.assert_close(network.log_likelihood(z, x), expected.flatten(1).sum(1))


def test_a_run_on_videos_has_a_report_and_a_model(tmp_path):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "x.npy", clips())
    options = ("--data", str(tmp_path / "x.npy"), "--model", "conv", "--layers", "1", "--batch-size", "8")
    assert train(tmp_path / "run", *options, "--importance-samples", "2", "--steps", "4") == 0
    names = {path.stem for path in (tmp_path / "run" / "pictures").iterdir()}
    assert {"reconstructions", "samples", "kl_per_dimension"} <= names
    model = vae.load(tmp_path / "run")
    assert model.encode(clips()[:3]).shape == (3, 3, 2, 4, 4)
    assert model.sample(2).shape == (2, 1, 4, 8, 8)
    model.export(tmp_path / "programs")
    program = torch.export.load(tmp_path / "programs" / "decoder.pt2").module()
    z = torch.randn(5, 3, 2, 4, 4)
    torch.testing.assert_close(program(z), model.decode(z), rtol=1e-6, atol=1e-6)


def test_pictures_show_the_frames_side_by_side():
    video = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 1, 5, 2, 3)
    shown = events.tiled(video)
    assert shown.shape == (2, 1, 4, 9)
    assert shown[0, 0, ::2, ::3].tolist() == [[0, 1, 2], [3, 4, 0]], "black where there is no frame"
    long = torch.arange(46.0).view(1, 1, 46, 1, 1)
    assert events.tiled(long).flatten().tolist() == list(range(0, 46, 3)), "16 frames, evenly spaced"
    of = types.SimpleNamespace(range=(0.0, 4.0))
    assert events.shades(video, of).max() == 1


def test_sides_that_cannot_be_halved_are_named(tmp_path, capsys):
    np.save(tmp_path / "x.npy", clips(frames=5))
    error = refused(capsys, tmp_path / "run", "--data", str(tmp_path / "x.npy"), "--model", "conv", "--layers", "2")
    assert "--layers 2 needs sides divisible by 4, got 5 x 8 x 8" in error
