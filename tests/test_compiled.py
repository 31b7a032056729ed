"""The kernels as compiled code, without a GPU: no spills, 16-byte accesses, little shared memory.

Each test_<op>.py with kernels lists in `aot_calls()` the cases that its launcher can choose. The first two named "core"
are compiled here for one target; `make compat` compiles all of these for all targets and versions of Triton, and every
case for one target.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aot
from helpers import search_path

HERE = Path(__file__).parent
ENVIRONMENT = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=search_path(HERE))


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled(request):
    """All requested kernels, compiled in one run, so that its processes import torch only once."""
    items = [item for item in request.session.items if item.path == Path(__file__) and "module" in item.fixturenames]
    chosen = {item.callspec.params["module"] for item in items}
    return [json.loads(line) for line in run(str(HERE / "aot.py"), *sorted(chosen), "--first", "2").splitlines()]


@pytest.mark.parametrize("module", aot.MODULES)
def test_core_calls_compile_without_a_fault(module, compiled):
    records = [record for record in compiled if record["module"] == module]
    assert records
    assert [(record["call"], fault) for record in records for fault in aot.faults(record)] == []


def test_each_fault_is_named():
    well = {"call": "core aligned", "kernel": "a_bwd_kernel", "target": "sm_90", "spills": 0, "shared": 0}
    well |= {"wide_loads": 1, "wide_stores": 1}
    assert aot.faults(well) == []
    for change, word in [
        ({"spills": 8}, "spills 8"),
        ({"shared": 1 << 17}, "shared memory"),
        ({"wide_loads": 0}, "load"),
        ({"wide_stores": 0}, "store"),
        ({"error": "CompilationError: no"}, "no"),
    ]:
        (fault,) = aot.faults(well | change)
        assert word in fault
    assert aot.faults(well | {"call": "odd", "wide_loads": 0}) == []


FAULTY = """
import aot, torch, triton
from fastkl.kernels.normal import kl_normal
from triton.runtime.jit import JITFunction
from types import SimpleNamespace

# Held to few registers.
run = JITFunction.run
JITFunction.run = lambda self, *args, **options: run(self, *args, **{**options, "maxnreg": 24})
mu = torch.zeros(64, 4096)
with aot.compiling("sm_90", lambda kernel, function, options: print(aot.describe(kernel, "sm_90")["spills"])):
    kl_normal.fwd(mu, mu, None, None, 1, "logvar", float("-inf"), float("inf"), False)

@triton.jit
def broken_kernel(x):
    x.no_such_name

def launch():
    broken_kernel[(1,)](1)

aot.importlib = SimpleNamespace(import_module=lambda name: SimpleNamespace(aot_calls=lambda: {"core": launch}))
(record,) = aot.compile_module("any", "sm_90", False)
print(record["error"])
"""


@pytest.fixture(scope="module")
def spills_and_error(tmp_path_factory):
    script = tmp_path_factory.mktemp("faulty") / "faulty.py"
    script.write_text(FAULTY)  # Triton reads a kernel's source from its file
    return run(str(script)).split("\n", 1)


def test_a_spill_would_be_seen(spills_and_error):
    assert int(spills_and_error[0]) > 0


def test_a_kernel_that_does_not_compile_is_an_error(spills_and_error):
    assert "no_such_name" in spills_and_error[1]
