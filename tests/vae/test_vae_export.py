"""`fastkl export`: programs that run without fastkl and give what the model gives."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastkl import vae
from fastkl.vae.cli import main
from fastkl.vae.errors import UserError

from vae_helpers import BARE, datasets, train

RUNS = {
    "bernoulli": (),
    "normal": ("--likelihood", "normal", "--prior", "gmm", "--components", "3", "--warm-up", "4"),
    "conv": ("--model", "conv", "--layers", "1", "--hidden", "8", "--steps", "3", "--activation-checkpointing"),
    "resized": ("--image-size", "4", "--likelihood", "categorical", "--steps", "3"),
}
# Every program of a folder runs on its input, in a process that cannot import fastkl.
READER = """
import sys, pathlib, numpy as np, torch
sys.modules["fastkl"] = sys.modules["triton"] = None
for folder in map(pathlib.Path, sys.argv[1:]):
    for name, argument in (("encoder", "x"), ("decoder", "z")):
        given = torch.from_numpy(np.load(folder / f"{argument}.npy"))
        found = torch.export.load(folder / f"{name}.pt2").module()(given)
        torch.save(found, folder / f"{name}.pt")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (model, folder of its programs, data, latents, the notes)."""
    made = {}
    for name, options in RUNS.items():
        folder = tmp_path_factory.mktemp("export") / name
        assert train(folder, *BARE, *options) == 0
        model, programs = vae.load(folder), folder / "programs"
        found = model.export(programs)
        x = torch.from_numpy(datasets.load_digits().images[:5]).float()[:, None]
        x = x[..., ::2, ::2].contiguous() if name == "resized" else x
        z = torch.randn(7, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        np.save(programs / "x.npy", x.numpy())
        np.save(programs / "z.npy", z.numpy())
        made[name] = (model, programs, x, z, found)
    folders = [str(one[1]) for one in made.values()]
    done = subprocess.run([sys.executable, "-c", READER, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("name", RUNS)
def test_the_programs_run_without_fastkl_and_give_what_the_model_gives(exported, name):
    model, folder, x, z, _ = exported[name]
    mean, logvar = torch.load(folder / "encoder.pt")
    q = model.posterior(x)
    torch.testing.assert_close((mean, logvar), (q.mean, q.logvar), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.load(folder / "decoder.pt"), model.decode(z), rtol=1e-6, atol=1e-6)


def test_a_program_takes_any_number_of_data_and_holds_its_own_weights_alone(exported):
    model, folder, x, *_ = exported["bernoulli"]
    program = torch.export.load(folder / "encoder.pt2")
    assert not [name for name in program.state_dict if "decoder" in name]
    assert program.module()(x[:1])[0].shape == (1, 3)
    assert model.vae.decoder(torch.zeros(1, 3)).shape == (1, 1, 8, 8), "the model keeps its decoder"


def test_what_is_left_out_is_said(exported, tmp_path, capsys):
    described = json.loads((exported["conv"][1] / "export.json").read_text())
    assert described["encoder"] == {"x": ["N", 1, 8, 8], "mean": ["N", 3, 4, 4], "logvar": ["N", 3, 4, 4]}
    assert described["notes"] == exported["conv"][-1] == exported["bernoulli"][-1] == []
    assert exported["normal"][-1] == ["the gmm prior is left out: draws of it are `Trained.latents`"]
    assert exported["resized"][-1] == ["the encoder does not resize: give it images of 4 x 4 pixels"]
    assert train(tmp_path / "run", *BARE, "--model", "autoregressive", "--steps", "2") == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "programs")]) == 0
    assert "the decoder is left out: an autoregressive one draws its values in a loop" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "programs").iterdir()}
    assert names == {"encoder.pt2", "export.json"}


def test_what_cannot_be_exported_is_named(exported, tmp_path, monkeypatch):
    model = exported["bernoulli"][0]

    class Branching(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :6] * (2.0 if x.sum() > 0 else 1.0)

    own = vae.VAE(Branching(), nn.Linear(3, 64), (1, 8, 8), (3,), "bernoulli")
    other = vae.Trained(own, None, model.scaling, model.settings, 0)
    with pytest.raises(UserError, match="the encoder cannot be exported as pt2: ") as error:
        other.export(tmp_path)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".pt2"]
    with pytest.raises(UserError, match="format must be pt2 or onnx, got 'tf'"):
        model.export(tmp_path, format="tf")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: the folder is not writable"):
        model.export(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--format onnx needs onnx, which is not installed: pip install onnx"):
        model.export(tmp_path, format="onnx")


@pytest.mark.parametrize("name", ["normal", "conv"])
def test_onnx_programs_give_what_the_model_gives(exported, tmp_path, name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, _, x, z, _ = exported[name]
    model.export(tmp_path, format="onnx")
    encoder, decoder = (runtime.InferenceSession(tmp_path / f"{part}.onnx") for part in ("encoder", "decoder"))
    q = model.posterior(x)
    for found, expected in zip(encoder.run(["mean", "logvar"], {"x": x.numpy()}), (q.mean, q.logvar)):
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
    (found,) = decoder.run(None, {"z": z.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.decode(z), rtol=1e-5, atol=1e-5)
