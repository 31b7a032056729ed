"""What the compiled kernels cost, as disassembled for sm_90: instructions of an element, loads in flight, grids.

Budgets are a little above what was counted (docs/kernels.md). At b bytes an element an H100 is bound by memory up to
8.8 b instructions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# op, dtype -> instructions of an element, forward and backward
BUDGETS = {
    ("rsample_kl", "float32"): (74, 76),
    ("rsample_kl", "bfloat16"): (64, 65),
    ("kl_normal", "bfloat16"): (33, 33),
    ("normal_log_prob", "bfloat16"): (32, 36),
}
COUNT = """
import json, sys, torch
from bench import tune
from triton.runtime.jit import JITFunction
from fastkl.kernels import kl_normal, rsample_kl

for op, name in json.loads(sys.argv[1]):
    for direction, (_, call) in tune.calls(op, tune.DTYPES[name], "cpu").items():
        print(json.dumps([op, name, direction, *tune.compiled(call, "sm_90")]))

def run(self, *args, grid, warmup=False, **kwargs):
    print(json.dumps(["grid", self.__name__, list(grid), kwargs["ROWS"], kwargs["COLUMNS"]]))

JITFunction.run = run
seed, rows = torch.zeros((), dtype=torch.int64), torch.zeros(1)
for shape in ((1, 1 << 24), (1 << 16, 64), (1 << 16, 3)):
    q, rows = [torch.empty(shape)] * 2, torch.empty(shape[0])
    kl_normal.fwd(q, -1, [], 1, *tune.NO_BOUNDS)
    kl_normal.bwd(rows, q, -1, [], 1, *tune.NO_BOUNDS, False)
    rsample_kl.fwd(q, seed, None, None, -1, [], 1, *tune.NO_BOUNDS)
    rsample_kl.bwd(q[0], rows, q, seed, None, None, -1, [], 1, *tune.NO_BOUNDS, False)
"""


@pytest.fixture(scope="module")
def counted():
    command = [sys.executable, "-c", COUNT, json.dumps(list(BUDGETS))]
    environment = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("op", "dtype"), BUDGETS, ids=str)
def test_instructions_and_loads_in_flight(counted, op, dtype, direction):
    ((instructions, _, in_flight, spills),) = [line[3:] for line in counted if line[:3] == [op, dtype, direction]]
    assert instructions <= BUDGETS[op, dtype][direction == "bwd"]
    assert in_flight >= 32 * 1024
    assert spills == 0


def test_one_long_row_is_split_and_short_rows_are_packed(counted):
    """A row of 2^24 over all 132 multiprocessors of an H100; rows of 64 and of 3 elements many to a program."""
    grids = [line[2:] for line in counted if line[0] == "grid"]
    long, packed, tiny = grids[:4], grids[4:8], grids[8:]
    assert all(grid[0] >= 2 * 132 for grid, _, _ in long)
    assert [columns for _, _, columns in packed] == [64] * 4
    assert all(rows >= 16 and grid[0] == (1 << 16) // rows for grid, rows, _ in packed)
    assert all(rows >= 64 for _, rows, _ in tiny)
