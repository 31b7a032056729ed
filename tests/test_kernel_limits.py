"""Costs of the compiled, disassembled kernels: instructions per element, loads in flight, width, spills, grids.

Limits are slightly above the counts with Triton 3.9 (docs/kernels.md); up to 3.7 a few kernels take up to five
instructions more. With b bytes per element, an H100 is memory-bound up to 8.8 b instructions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkl.kernels._layout import TRITON

from helpers import search_path

if not os.environ.get("FASTKL_LIMITS"):
    pytest.skip("`make compat` asks for it: what it compiles takes a minute", allow_module_level=True)

ROOT = Path(__file__).parent.parent
# op, dtype -> instructions of an element on sm_90, forward and backward
BUDGETS = {
    ("bernoulli_log_prob", "float32"): (37, 27),
    ("bernoulli_log_prob", "bfloat16"): (35, 29),
    ("gumbel_softmax", "float32"): (67, 74),
    ("gumbel_softmax", "bfloat16"): (68, 76),
    ("kl_normal", "float32"): (34, 39),
    ("kl_normal", "bfloat16"): (33, 36),
    ("kl_normal_per_dim", "float32"): (38, 42),
    ("kl_normal_per_dim", "bfloat16"): (35, 37),
    ("normal_log_prob", "float32"): (28, 34),
    ("normal_log_prob", "bfloat16"): (27, 34),
    ("rsample_kl", "float32"): (66, 76),
    ("rsample_kl", "bfloat16"): (60, 65),
    ("rsample_normal", "float32"): (49, 53),
    ("rsample_normal", "bfloat16"): (39, 42),
    ("wasserstein2_normal", "float32"): (33, 36),
    ("wasserstein2_normal", "bfloat16"): (32, 38),
}
# Bytes in flight for a multiprocessor are 32 KiB and more but for these, whose registers leave room for fewer programs.
FEWER_IN_FLIGHT = {("rsample_kl", "bfloat16", "fwd"): 30 * 1024}
TARGETS = ("sm_90",)
COUNT = """
import json, sys, torch
from bench import tune
from triton.runtime.jit import JITFunction
from fastkl.kernels.normal import kl_normal, rsample_kl

target = sys.argv[2]
for op, name in json.loads(sys.argv[1]):
    for direction, (tensors, call) in tune.calls(op, tune.DTYPES[name], "cpu").items():
        found = tune.compiled(call, target)._asdict() | {"bytes": tensors * tune.DTYPES[name].itemsize}
        print(json.dumps([op, name, direction, found]))

def run(self, *args, grid, warmup=False, **kwargs):
    print(json.dumps(["grid", self.__name__, list(grid), kwargs["ROWS"], kwargs["COLUMNS"]]))

JITFunction.run = run
seed, rows = torch.zeros((), dtype=torch.int64), torch.zeros(1)
for shape in ((1, 1 << 24), (1 << 16, 64), (1 << 16, 3)):
    q, rows = [torch.empty(shape)] * 2, torch.empty(shape[0])
    none, settings = (None, None), (1, *tune.NO_BOUNDS)
    kl_normal.fwd(*q, *none, *settings)
    kl_normal.bwd(rows, *q, *none, *q, *none, *settings)
    rsample_kl.fwd(*q, *none, None, seed, *settings, None, 1)
    rsample_kl.bwd(q[0], rows, *q, *none, None, seed, *q, *none, *settings, None, 1)
"""


@pytest.fixture(scope="module", params=TARGETS)
def counted(request):
    command = [sys.executable, "-c", COUNT, json.dumps(list(BUDGETS)), request.param]
    environment = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=search_path(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("op", "dtype"), BUDGETS, ids=str)
def test_instructions_width_and_loads_in_flight(counted, op, dtype, direction):
    target, lines = counted
    (found,) = [line[3] for line in lines if line[:3] == [op, dtype, direction]]
    assert found["spills"] == 0
    assert found["wide"] >= found["bytes"]  # every tensor, 16 bytes a thread and more
    if target == "sm_90":
        assert found["instructions"] <= BUDGETS[op, dtype][direction == "bwd"] + 5 * (TRITON < (3, 8))
        assert found["in_flight"] >= FEWER_IN_FLIGHT.get((op, dtype, direction), 32 * 1024)


def test_one_long_row_is_split_and_short_rows_are_packed(counted):
    """A row of 2^24 over all 132 multiprocessors of an H100; rows of 64 and of 3 elements many to a program."""
    grids = [line[2:] for line in counted[1] if line[0] == "grid"]
    long, packed, tiny = grids[:4], grids[4:8], grids[8:]
    assert all(grid[0] >= 2 * 132 for grid, _, _ in long)
    assert [columns for _, _, columns in packed] == [64] * 4
    assert all(rows >= 16 and grid[0] == (1 << 16) // rows for grid, rows, _ in packed)
    assert all(rows >= 64 for _, rows, _ in tiny)
