"""The model of a run, used elsewhere: `fastkl.vae.load` and the commands that read a run."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastkl import vae
from fastkl.vae import checkpoint, commands
from fastkl.vae.cli import main
from fastkl.vae.errors import UserError

from vae_helpers import BARE, datasets, linear_gaussian, run, train

RUNS = {
    "bernoulli": (),
    "normal": ("--likelihood", "normal"),
    "conv": ("--model", "conv", "--layers", "1", "--hidden", "8", "--steps", "3"),
    "autoregressive": ("--model", "autoregressive", "--steps", "3"),
    "gmm": ("--prior", "gmm", "--components", "3", "--warm-up", "4"),
    "vamp": ("--prior", "vamp", "--components", "3", "--warm-up", "4", "--ema", "0.5"),
    "resized": ("--model", "conv", "--image-size", "4", "--layers", "1", "--hidden", "8", "--steps", "3"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / name
            assert train(made[name], *BARE, *RUNS[name]) == 0
        return made[name]

    return get


def pixels():
    return datasets.load_digits().images


@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_model_is_that_of_the_run(runs, monkeypatch, name):
    """Its ELBO of the test data is the last point of the run's curve, bit for bit."""
    from fastkl.vae import data
    from fastkl.vae.evaluate import quick_elbo

    model = vae.load(runs(name))
    state = checkpoint.load(runs(name))
    source = data.load(model.settings)
    found = quick_elbo(model.vae, source.test, model.settings.seed, model.device, model.prior)
    assert [*found] == state["history"]["test"][-1][1:]
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    assert model.step == state["step"]


@pytest.mark.parametrize("name", RUNS)
def test_shapes_and_units(runs, name):
    model, x = vae.load(runs(name)), pixels()[:7]
    z = model.encode(x)
    assert z.shape == (7, *model.latent_shape)
    torch.testing.assert_close(z, model.posterior(torch.from_numpy(x)[:, None]).mean)
    decoded, samples = model.decode(z), model.sample(5, seed=3)
    assert decoded.shape == (7, *model.shape)
    assert samples.shape == (5, *model.shape)
    torch.testing.assert_close(samples, model.sample(5, seed=3), rtol=0, atol=0)
    assert not samples.equal(model.sample(5, seed=4))
    if name != "normal":
        assert 0 <= decoded.min() < decoded.max() <= 16  # grey levels of the file
    assert 3 < decoded.mean() < 13, "the mean grey level of the data is about 5"
    assert model.log_prob(x, num_samples=3).shape == (7,)


def test_the_average_of_the_weights_is_the_default(runs):
    folder = runs("vamp")
    mean, last = vae.load(folder), vae.load(folder, weights="last")
    state = checkpoint.load(folder)
    torch.testing.assert_close(dict(last.vae.state_dict()), state["model"], rtol=0, atol=0)
    assert not mean.encode(pixels()[:3]).equal(last.encode(pixels()[:3]))
    with pytest.raises(UserError, match="weights must be one of average, last, got 'best'"):
        vae.load(folder, weights="best")


def test_scaled_data_return_to_their_units(runs):
    for name in ("bernoulli", "normal"):
        model, x = vae.load(runs(name)), pixels()[:9, None]
        torch.testing.assert_close(model.scaling.undo(model.scaled(x)), torch.from_numpy(x).float())


def test_log_prob_is_that_of_the_model():
    """Of a linear model, whose log p(x) is known."""
    from fastkl.vae.data.scaling import Scaling
    from fastkl.vae.settings import Settings

    network, x, marginal = linear_gaussian()
    same = Scaling("normal", np.zeros(5), np.ones(5))
    model = vae.Trained(network, None, same, Settings(), 0)
    torch.testing.assert_close(model.log_prob(x, num_samples=2000), marginal.log_prob(x), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(np.zeros((3, 5))), r"x must be data of shape \[1, 8, 8\], got \[5\]"),
        (lambda model: model.encode(np.full((3, 8, 8), np.nan)), "3 rows with NaN or infinite values"),
        (lambda model: model.encode(np.array(["a"])), "expected numbers"),
        (lambda model: model.decode(torch.zeros(3, 4)), r"z must be latents \[N, 3\], got \[3, 4\]"),
        (lambda model: model.decode(torch.full((3, 3), torch.nan)), "z must be finite, but holds NaN"),
        (lambda model: model.decode(1.0), r"z must be latents \[N, 3\], got \[\]"),
    ],
)
def test_wrong_data_are_named(runs, call, message):
    with pytest.raises(UserError, match=message):
        call(vae.load(runs("bernoulli")))


def test_a_damaged_checkpoint_is_named(runs, tmp_path):
    content = (runs("bernoulli") / checkpoint.NAME).read_bytes()
    (tmp_path / checkpoint.NAME).write_bytes(content[:5000])
    with pytest.raises(UserError, match="truncated, or not a checkpoint"):
        vae.load(tmp_path)


def test_commands_write_what_the_model_gives(runs, tmp_path, monkeypatch, capsys):
    """Block by block: a block of 100 rows stands for a file larger than the memory."""
    monkeypatch.setattr(commands, "ROWS", 100 * 64)
    folder, model, x = runs("bernoulli"), vae.load(runs("bernoulli")), pixels()
    np.save(tmp_path / "x.npy", x)
    paths = {name: str(tmp_path / f"{name}.npy") for name in ("x", "encode", "decode", "reconstruct", "sample")}
    assert main(["encode", str(folder), paths["x"], "--out", paths["encode"]]) == 0
    assert main(["decode", str(folder), paths["encode"], "--out", paths["decode"]]) == 0
    assert main(["reconstruct", str(folder), paths["x"], "--out", paths["reconstruct"]]) == 0
    assert main(["sample", str(folder), "--count", "5", "--seed", "3", "--out", paths["sample"]]) == 0
    assert "1,797 rows of shape [3]" in capsys.readouterr().out
    z = model.encode(x)
    expected = {
        "encode": z,
        "decode": model.decode(z),
        "reconstruct": model.decode(z),
        "sample": model.sample(5, seed=3),
    }
    for name, values in expected.items():
        torch.testing.assert_close(torch.from_numpy(np.load(paths[name])), values)
    assert not list(tmp_path.glob(".*.tmp"))


def test_sample_of_an_autoregressive_model_is_that_of_the_command(runs, tmp_path, monkeypatch):
    """In several batches, each of which draws values."""
    from fastkl.vae import trained

    monkeypatch.setattr(trained, "DECODED", 3 * 64)
    assert (
        main(["sample", str(runs("autoregressive")), "--count", "7", "--seed", "3", "--out", f"{tmp_path}/s.npy"]) == 0
    )
    expected = vae.load(runs("autoregressive")).sample(7, seed=3)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "s.npy")), expected, rtol=0, atol=0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_a_command_with_one_line(runs, tmp_path, small_disk):
    """In a process of its own: a memory map of a full disk would end it by SIGBUS."""
    np.save(tmp_path / "z.npy", np.zeros((4000, 3), np.float32))
    words = ["decode", str(runs("bernoulli")), str(tmp_path / "z.npy"), "--out", str(small_disk / "x.npy")]
    done = run([sys.executable, "-m", "fastkl.vae", *words])
    assert done.returncode == 2, done.stderr
    assert "x.npy: cannot be written: the disk is full" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(small_disk.iterdir()), "nothing is left"


def test_evaluate_prints_the_figures_of_the_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert train(tmp_path / "run", "--no-tensorboard", "--importance-samples", "10") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: metrics[name] for name in found} == found
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").exists()
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {name: again[name] for name in found} == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encode", "{run}", "{x}", "--out", "z.txt"], "--out z.txt: the name must end in .npy"),
        (["encode", "{run}", "nothing.npy", "--out", "z.npy"], "nothing.npy: cannot be read"),
        (["encode", "{run}", "{text}", "--out", "z.npy"], "DATA text.npy: not a .npy file"),
        (["encode", "nothing", "{x}", "--out", "z.npy"], "nothing/checkpoint.pt cannot be read"),
        (["encode", "{run}", "{x}", "--out", "nowhere/z.npy"], "--out nowhere/z.npy: cannot be written"),
        (["decode", "{run}", "{x}", "--out", "z.npy"], "LATENTS x.npy: z must be latents [N, 3]"),
        (
            ["encode", "{run}", "{nan}", "--out", "z.npy"],
            "DATA nan.npy, of rows 20 to 29: x: 1 rows with NaN or infinite values, the first is row 3",
        ),
        (["sample", "{run}", "--count", "0", "--out", "z.npy"], "--count must be at least 1, got 0"),
        (["evaluate", "{run}", "--importance-samples", "-1"], "--importance-samples must be at least 1, got -1"),
    ],
)
def test_one_line_errors_of_the_commands(runs, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", pixels()[:3])
    (tmp_path / "text.npy").write_text("no array")
    images = np.zeros((40, 8, 8))
    images[23, 0, 0] = np.nan
    np.save("nan.npy", images)
    monkeypatch.setattr(commands, "ROWS", 10 * 64)
    places = {"run": runs("bernoulli"), "x": "x.npy", "text": "text.npy", "nan": "nan.npy"}
    capsys.readouterr()
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("x.npy", "text.npy", "nan.npy")], (
        "nothing is left"
    )
