"""The report of a run."""

from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from fastkl.vae import checkpoint, facts, progress
from fastkl.vae.pictures import plane, spaced
from fastkl.vae.report import named, provenance, strict

from vae_helpers import train

pytest.importorskip("matplotlib")

PICTURES = {"loss_curves", "reconstructions", "samples", "latent_space", "kl_per_dimension"}


def test_report_holds_every_figure_and_needs_no_other_file(tmp_path, capsys):
    assert train(tmp_path, "--no-tensorboard", "--importance-samples", "20") == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("elbo", "kl", "reconstruction", "log_prob", "active_units"):
        assert np.isfinite(metrics[name])
    assert metrics["elbo"] == pytest.approx(metrics["reconstruction"] - metrics["kl"], abs=1e-3)
    assert metrics["importance_samples"] == 20
    assert len(metrics["history"]["train"]) == 4
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == PICTURES
    page = (tmp_path / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = {path.read_bytes() for path in (tmp_path / "pictures").glob("*.png")}
    assert {base64.b64decode(image) for image in images} == files
    assert page.count("src=") == len(images) == len(PICTURES)
    assert "http" not in page
    assert "href" not in page
    for shown in ("ELBO", "log p(x)", "Reconstruction", "KL", "Active units", f"{metrics['elbo']:.2f}"):
        assert shown in page
        assert shown in said
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["hidden"] == 16
    assert '<tr class="changed"><td>--hidden</td><td>16</td><td>changed from 256</td></tr>' in page
    assert "<tr><td>--beta</td><td>1.0</td><td></td></tr>" in page
    assert "<title>digits: MLP VAE</title>" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == len(images)
    assert min(len(alt.split()) for alt in alts) > 8, "a picture's name says nothing of it to those who do not see it"
    (start,) = metrics["starts"]
    assert start["command"].startswith("fastkl train --out ")
    assert start["data_fingerprint"] == checkpoint.load(tmp_path)["fingerprint"][:16]
    for name in ("date", "command", "torch", "device", "data", "data_fingerprint"):
        assert html.escape(str(start[name])) in page
    assert "divided by 16" in page
    opening = said.splitlines()
    pattern = (
        rf"{re.escape(str(tmp_path))}: MLP VAE on digits, about [\d.]+ (s|min) on the CPU, \d+ threads?: 12 steps of"
    )
    assert re.match(pattern, opening[0])
    assert opening[1].startswith("data: digits: 1,438 training data, 359 test, each 1 x 8 x 8; ")
    assert opening[1].endswith("divided by 16; bernoulli likelihood")
    assert "nan" not in said
    assert not list(tmp_path.rglob("*.tmp"))


def test_vectors_without_labels_have_a_report_too(tmp_path):
    """And whatever a file is called, its name is text in the page."""
    path = tmp_path / "<b>x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(60, 7)))
    assert (
        train(
            tmp_path / "run", "--no-tensorboard", "--importance-samples", "5", "--data", str(path), "--batch-size", "16"
        )
        == 0
    )
    assert {path.stem for path in (tmp_path / "run" / "pictures").glob("*.png")} == PICTURES - {
        "reconstructions",
        "samples",
    }
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;b&gt;x.npy" in page
    assert "<b>x" not in page


def test_spatial_latent_reports_what_the_loss_costs(tmp_path, capsys):
    """The large-latent preset, smaller and on digits, so that it is quick."""
    options = ("--preset", "large-latent", "--data", "digits", "--image-size", "16", "--steps", "2", "--hidden", "8")
    options += ("--test-count", "4", "--layers", "1", "--batch-size", "4")
    assert train(tmp_path, *options, "--no-tensorboard", "--importance-samples", "2") == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "metrics.json").read_text())["loss_share"]["rows"]
    assert set(rows) == {"step", "eager loss", "fastkl loss"}
    # The seed of the noise is 8 bytes. The eager formula keeps three tensors as large as the latent.
    latent = 4 * 3 * 8 * 8 * 4 / 2**20
    assert rows["eager loss"]["kept"] >= 3 * latent
    assert rows["fastkl loss"]["kept"] < 0.01 * latent
    assert re.search(r"fastkl loss kept +[\d.e-]+ MiB \([\d.e-]+ %\)", said)
    assert "Memory and time of the loss" in (tmp_path / "report.html").read_text()


def test_bar_shows_elbo_kl_and_throughput(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run = types.SimpleNamespace(total_steps=10, batch_size=4, step=0)
    with progress.Terminal(run) as display:
        display.trained(5, -3.25, 1.5, -1.75, {})
        display.stepped(5)
        task = display.bar.tasks[0]
        assert task.completed == 5
        assert "ELBO -3.25  KL 1.50" in task.fields["text"]
        assert re.search(r"[\d,]+/s$", task.fields["text"])


def test_bar_before_the_first_point_of_the_curves(monkeypatch):
    run = types.SimpleNamespace(total_steps=10, batch_size=4, step=0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert re.fullmatch(r"  [\d,]+/s", progress.Terminal(run).line(1))


def test_the_report_tells_earlier_starts_from_the_last():
    last = {"date": "2026-02-02", "torch": "2.9", "commit": None, "data_shape": [7, 1, 8]}
    shown = provenance([{**last, "date": "2026-01-01", "torch": "2.8"}, last])
    assert "<tr><td>begun</td><td>2026-01-01; torch 2.8</td></tr>" in shown
    assert "<td>7 x 1 x 8</td>" in shown
    assert "commit" not in shown


def test_commit_is_that_of_fastkl_alone(tmp_path, monkeypatch):
    """An installed fastkl lies in an environment which may be inside some other repository."""
    monkeypatch.setattr(facts.fastkl, "__file__", str(tmp_path / "fastkl" / "__init__.py"))
    (tmp_path / "fastkl").mkdir()
    (tmp_path / "fastkl" / "__init__.py").touch()
    assert facts.commit() is None
    try:
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("needs git")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True, capture_output=True)
    assert facts.commit() is None, "the file is no part of this repository"
    for words in (["add", "fastkl"], ["commit", "-q", "-m", "y"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    assert re.fullmatch(r"[0-9a-f]{40}", facts.commit())
    (tmp_path / "fastkl" / "__init__.py").write_text("changed")
    assert facts.commit().endswith("+")


def test_plane_is_the_principal_components():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(30, 6, generator=generator) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.0])
    points, names = plane(means)
    centred = means - means.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(points.abs(), (left * values)[:, :2].abs(), rtol=1e-4, atol=1e-4)
    assert f"{100 * values[0] ** 2 / (values**2).sum():.0f} %" in names[0]
    assert plane(means[:, :2])[0].equal(means[:, :2])


def test_names_do_not_hide_one_another():
    places = spaced(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), np.array([2.0, 2.0]))
    assert np.linalg.norm(places[0] - places[1]) > 0.1
    assert np.allclose(places[2], 1.0)


def test_metrics_are_what_every_reader_of_json_reads():
    """Python writes NaN, which JSON has not; and one latent dimension's KL is a list, as that of several."""
    found = {"a": float("nan"), "b": [{"c": float("-inf"), "d": 1.5}, 2, None, "NaN"]}
    assert json.dumps(strict(found), allow_nan=False) == '{"a": null, "b": [{"c": null, "d": 1.5}, 2, null, "NaN"]}'
    assert named("monitors/kl_per_dimension", [3, 0.5]) == {"step": 3, "kl_per_dimension": [0.5]}
    assert named("monitors/active_units", [3, 1]) == {"step": 3, "active_units": 1}
