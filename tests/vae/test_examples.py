"""The examples run as they are, by public names only."""

import ast
import re
import sys
from pathlib import Path

import pytest

from fastkl.vae import checkpoint

from vae_helpers import run

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_example_of_sixty_lines_learns():
    done = run([sys.executable, str(EXAMPLES / "train_vae.py"), "--steps", "300"])
    assert done.returncode == 0, done.stderr
    elbo, bound = (float(number) for number in re.findall(r"(-?\d+\.\d+) nats", done.stdout))
    assert -27 < elbo < bound < -23, done.stdout  # after one step it is -42


def test_the_hierarchical_example_learns_and_uses_both_latents():
    done = run([sys.executable, str(EXAMPLES / "train_hierarchical_vae.py"), "--steps", "400"])
    assert done.returncode == 0, done.stderr
    elbo, lower, upper = (float(number) for number in re.findall(r"-?\d+\.\d+", done.stdout))
    assert -25 < elbo < -15, done.stdout  # before the first step it is -45
    assert lower > 1, done.stdout
    assert upper > 0.1, done.stdout


def test_the_example_of_single_cells_finds_the_cell_types():
    pytest.importorskip("scipy")
    done = run([sys.executable, str(EXAMPLES / "train_single_cells.py"), "--steps", "150"])
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"accuracy (\d\.\d+)", done.stdout)[0]) > 0.8, done.stdout


def test_the_example_of_images_reconstructs_and_scales_its_latents(tmp_path):
    """With a network of its own where diffusers is not installed."""
    script = str(EXAMPLES / "train_image_autoencoder.py")
    done = run([sys.executable, script, "--steps", "60", "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    (psnr,) = re.findall(r"PSNR of 359 test images: (\d+\.\d+) dB", done.stdout)
    assert float(psnr) > 13, "after one step it is below 12"
    assert "latents [1438, 4, 4, 4]" in done.stdout
    state = checkpoint.load(tmp_path / "run")
    assert {"terms/perceptual", "terms/accuracy"} <= set(state["history"])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_public(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    names = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    imported = re.findall(r"^(?:from|import) (fastkl[\w.]*)", text, re.MULTILINE)
    assert imported
    assert not [name for name in [*names, *imported] if re.search(r"fastkl\.(ops|kernels|native|.*\b_)", name)]
