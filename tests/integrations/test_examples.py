"""Every example runs by itself, in a process of its own, and the loss is the same with fastkl inside."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem.removeprefix("with_"): path for path in (ROOT / "examples" / "integrations").glob("with_*.py")}
LOSSES = {"distributions": 1, "pyro": 1, "pythae": 2, "scvi": 1}  # pairs of losses, the library's and fastkl's
NEEDS = {"distributions": "torch"}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_runs(name):
    if importlib.util.find_spec(NEEDS.get(name, name)) is None:
        pytest.skip(f"{name} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:  # Lightning leaves its folders where it runs
        ended = subprocess.run(
            [sys.executable, str(EXAMPLES[name])], env=environment, cwd=folder, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    losses = [float(word) for word in re.findall(r"loss ([-\d.]+),", ended.stdout)]
    for number in range(LOSSES.get(name, 0)):
        library, with_fastkl = losses[2 * number : 2 * number + 2]
        assert with_fastkl == pytest.approx(library, rel=1e-4)
    if name == "lightning":
        assert "free bits" in ended.stderr


def test_every_integration_has_an_example_and_a_page():
    modules = {path.stem for path in (ROOT / "fastkl" / "integrations").glob("[a-z]*.py")}
    assert modules | {"accelerate", "transformers"} == EXAMPLES.keys()
    pages = {path.stem for path in (ROOT / "docs" / "integrations").glob("[a-z]*.md")}
    assert modules | {"trainers"} == pages
