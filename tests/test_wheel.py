"""The wheel that a user installs, built from the tree and tested in a separate environment."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

import fastkl

ROOT = Path(__file__).parent.parent
SMOKE = """
import importlib, importlib.metadata, importlib.util, os, sys
from pathlib import Path

import torch
import fastkl, fastkl.kernels, fastkl.vae

home = Path(sys.prefix).resolve()
for package in (fastkl, fastkl.kernels, fastkl.vae):
    assert home in Path(package.__file__).resolve().parents, package.__file__
assert importlib.metadata.version("fastkl") == fastkl.__version__

mu, logvar = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), 1e-4, requires_grad=True)
fastkl.kl_normal(mu, logvar).sum().backward()
assert torch.allclose(logvar.grad, torch.full((2, 3), 5e-5))

if importlib.util.find_spec("triton"):
    folder = Path(fastkl.kernels.__file__).parent
    for file in folder.rglob("*.py"):
        importlib.import_module(".".join(("fastkl.kernels", *file.relative_to(folder).with_suffix("").parts)))
    free = (float("-inf"), float("inf"), False)
    if not torch.cuda.is_available():
        kl = fastkl.kernels.normal.kl_normal.fwd(mu.detach(), logvar.detach(), None, None, 1, "logvar", *free)
        assert torch.allclose(kl, torch.full((2,), 7.5e-9), rtol=1e-3, atol=0), kl
print("fine")
"""


def run(*command, **settings) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy, so that neither an old build/ gets into the wheel nor a new one into the tree."""
    pytest.importorskip("setuptools")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in ("fastkl", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, tree)
    (built,) = out.glob("fastkl-*.whl")
    return built


def test_wheel_has_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(next(n for n in archive.namelist() if n.endswith("entry_points.txt"))).decode()
    expected = {f"fastkl/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    sources = [path for path in (ROOT / "fastkl").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected |= {path.relative_to(ROOT).as_posix() for path in sources}
    assert files == expected
    assert "fastkl/py.typed" in files  # type checkers read the annotations of fastkl then
    assert wheel.name.startswith(f"fastkl-{fastkl.__version__}-")  # the version has one place
    assert "fastkl = fastkl.vae.cli:main" in entry_points


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    home, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(home)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    # Torch, NumPy and Triton as they are here. A .pth file adds the folder, not what the .pth files in it say, so an
    # editable fastkl stays out.
    folders = {str(Path(module.__file__).parents[1]) for module in (torch, numpy)}
    site = run(python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "here.pth").write_text("\n".join(sorted(folders)) + "\n")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    assert run(python, "-I", "-c", SMOKE, cwd=elsewhere, env=environment) == "fine\n"
