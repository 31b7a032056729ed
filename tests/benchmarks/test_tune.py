"""bench/tune.py without a GPU: candidates are ranked by what they compile to, and writing changes the table only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import estimate, tune

ROOT = Path(__file__).parents[2]


def test_ranks_candidates_without_a_gpu():
    if tune.torch.cuda.is_available():
        pytest.skip("times them here")
    command = [sys.executable, "-m", "bench.tune", "--op", "bernoulli_log_prob", "--dtype", "float32"]
    command += ["--tile", "1024x4", "8192x4"]  # a tile whose loads all are under way at once, and one of many registers
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, TRITON_INTERPRET="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines() if " x 4 " in line]
    assert done.stdout.startswith("ESTIMATE")
    assert sorted(line[0] for line in lines) == ["1024", "8192"]
    estimates = [float(line[3]) for line in lines]
    # At least what 5 float32 at the bandwidth take, both ways.
    assert 20 / 3.35 - 0.01 <= estimates[0] <= estimates[1] < 60


def test_estimate_is_bound_by_memory_latency_or_instructions():
    fast = estimate.Code(instructions=10, registers=32, in_flight=64 * 1024, spills=0)
    assert estimate.estimate(3, 4, fast) == pytest.approx(12 / 3.35e12)
    assert estimate.estimate(3, 4, fast._replace(in_flight=16 * 1024)) == pytest.approx(2 * 12 / 3.35e12)
    assert estimate.estimate(3, 4, fast._replace(instructions=200)) == pytest.approx(200 / 2.96e13)


def test_counts_loads_that_wait():
    sass = """
        /*0000*/  @P0 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0010*/      LDG.E.64 R12, desc[UR4][R4.64] ;
        /*0020*/      FADD R9, R9, R9 ;
        /*0030*/      LDG.E.U16 R20, desc[UR4][R6.64] ;
        /*0040*/      FADD R3, R13, R20 ;
        /*0050*/      EXIT ;
        /*0060*/      BRA `(.L) ;
        /*0070*/      NOP ;
    """
    found = estimate.instructions(sass)
    assert [operation for operation, _ in found] == ["LDG.E.128", "LDG.E.64", "FADD", "LDG.E.U16", "FADD", "EXIT"]
    assert estimate.bytes_in_flight(found) == 24
    assert estimate.moved_wide(found) == 16  # the first of the three
    assert estimate.resident_threads(registers=65, threads=128) == 65536 // (72 * 128) * 128


def test_writing_changes_the_table_only():
    source = tune.TABLE.read_text()
    assert tune.written(source, {}) == source
    changed = tune.written(source, {"rsample_kl": {2: (4096, 8)}}).splitlines()
    lines = source.splitlines()
    different = [index for index, (old, new) in enumerate(zip(lines, changed, strict=True)) if old != new]
    assert len(different) == 1
    assert changed[different[0]].startswith('    "rsample_kl": {2: (4096, 8), 4: ')
