"""The kernels as compiled code, for every target, without a GPU: no spills, 16-byte accesses, little shared memory.

Each test_<op>.py with kernels lists in `aot_calls()` what its launcher can choose. Calls named "core" are compiled for
every target; those with "aligned" in the name have rows of whole 16-byte runs, and must move them 16 bytes at a time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import TARGETS

HERE = Path(__file__).parent
ENVIRONMENT = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(HERE))
MODULES = sorted(path.stem for path in HERE.glob("test_*.py") if "\ndef aot_calls" in path.read_text())
SHARED_LIMIT = 64 * 1024  # gfx942 has the smallest


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled(request):
    """All that is asked for, from one run: its processes import torch once and stay busy to the end."""
    items = [item for item in request.session.items if item.path == Path(__file__) and "records" in item.fixturenames]
    chosen = {item.callspec.params["records"] for item in items}
    return [json.loads(line) for line in run(str(HERE / "aot.py"), *sorted(chosen)).splitlines()]


@pytest.fixture(params=MODULES)
def records(request, compiled):
    return [record for record in compiled if record["module"] == request.param]


def test_compiles_for_every_target(records):
    core = {record["call"] for record in records if record["call"].startswith("core")}
    assert core
    for target in TARGETS:
        assert {record["call"] for record in records if record["target"] == target} >= core


def test_no_spills(records):
    assert [record for record in records if record["spills"]] == []


HELD_TO_FEW_REGISTERS = """
import aot, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from fastkl.kernels import kl_normal

def run(self, *args, grid, warmup=False, **kwargs):
    target = GPUTarget(*aot.TARGETS["sm_90"])
    kernel = aot.compile_for(self, args, {**kwargs, "maxnreg": 24}, target)
    print(aot.describe(kernel, target)["spills"])

JITFunction.run = run
mu = torch.zeros(64, 4096)
kl_normal.fwd([mu, mu], -1, [], 1, "logvar", float("-inf"), float("inf"), False)
"""


def test_a_spill_would_be_seen():
    assert int(run("-c", HELD_TO_FEW_REGISTERS)) > 0


def test_shared_memory_fits(records):
    assert [record for record in records if record["shared"] > SHARED_LIMIT] == []


def test_aligned_rows_move_16_bytes_at_a_time(records):
    # A tile may be too small for the 64 lanes of gfx942, which then move 8 bytes each.
    small = [record for record in records if "32 lanes" in record["call"] and record["target"] == "gfx942"]
    aligned = [record for record in records if "aligned" in record["call"] and record not in small]
    assert aligned
    assert [record for record in aligned if not record["wide_loads"]] == []
    elementwise = [record for record in aligned if "bwd" in record["kernel"] or "rsample" in record["kernel"]]
    assert [record for record in elementwise if not record["wide_stores"]] == []
