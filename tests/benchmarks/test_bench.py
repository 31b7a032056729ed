"""The benchmark as a person runs it: options, what is on disk when it ends or is interrupted, and how it times."""

import csv
import importlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastkl
from bench import precompile, timing

for package in ("matplotlib", "rich"):  # without which the command ends at once
    pytest.importorskip(package)
command = importlib.import_module("bench.__main__")

OPS = ["gmm_responsibilities", "wasserstein2_normal"]  # the quickest to measure, without torch.compile


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs the command with as few steps as can be; returns its exit status."""
    pace = timing.Pace(2, 1e-4, 0.1)
    monkeypatch.setattr(command, "QUICK", pace)
    monkeypatch.setattr("bench.measure.QUICK", pace)

    def run(*arguments):
        return command.main([*arguments, "--quick", "--threads", "1", "--output", str(tmp_path)])

    run.folder = tmp_path
    return run


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_goes_on_to_tables_pictures_and_page(quick, monkeypatch, capsys):
    own, calls = command.measure.rows_of, []

    def interrupted(op, case, *others, **settings):
        calls.append((op, case.name))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(op, case, *others, **settings)

    monkeypatch.setattr(command.measure, "rows_of", interrupted)
    assert quick(*OPS) == 130
    assert "--resume" in capsys.readouterr().err
    kept = (quick.folder / "ops.csv").read_text()
    assert {(row["op"], row["case"]) for row in read(quick.folder / "ops.csv")} == {calls[0]}
    assert quick(*OPS, "--resume") == 0
    assert calls.count(calls[0]) == 1
    assert len(calls) == len(set(calls)) + 1  # the one that was interrupted is measured again
    # The first lines are as they were, number for number; new columns may have come.
    before, after = list(csv.DictReader(kept.splitlines())), read(quick.folder / "ops.csv")
    assert [{name: row[name] for name in before[0]} for row in after[: len(before)]] == before
    rows = read(quick.folder / "ops.csv")
    assert {row["op"] for row in rows} == set(OPS)
    by_name = {row["provider"]: row for row in rows if (row["op"], row["case"]) == ("wasserstein2_normal", "128 x 32")}
    assert set(by_name) == {"eager", "fastkl", "limit", "copy"}
    ours = by_name["fastkl"]
    unit = 4 * 128 * 32
    assert [int(ours[f"bytes_{way}"]) for way in ("forward", "backward")] == [2 * unit + 4 * 128, 4 * unit + 4]
    assert (ours["launches_forward"], ours["launches_backward"], ours["saved_bytes"]) == ("1", "1", "0")
    assert float(by_name["copy"]["percent_of_copy"]) == 100
    for row in (ours, by_name["eager"]):
        assert 0 < float(row["both_ms_low"]) <= float(row["both_ms"]) <= float(row["both_ms_high"])
        assert float(row["host_us"]) > 0
    page = (quick.folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # needs no other file
    for name in ("bench_ops",):
        assert (quick.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (quick.folder / f"{name}.svg").read_text()
    assert json.loads((quick.folder / "machine.json").read_text())["threads"] == [1]
    assert "wasserstein2_normal" in capsys.readouterr().out


def test_what_does_not_match_is_not_timed(quick, monkeypatch, capsys):
    own = fastkl.wasserstein2_normal
    monkeypatch.setattr("fastkl.wasserstein2_normal", lambda *inputs: 1.0001 * own(*inputs))
    assert quick("wasserstein2_normal") == 1
    assert "NOT TIMED: wasserstein2_normal 128 x 32: fastkl: output 0 differs" in capsys.readouterr().err
    ours = [row for row in read(quick.folder / "ops.csv") if row["provider"] == "fastkl"]
    assert all(row["note"] and not row["both_ms"] for row in ours)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["kl_norma"], "unknown op kl_norma; expected"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_every_case_has_a_name_of_its_own():
    given = command.options(["--threads", "1"])
    keys = [(job.part, job.key) for job in command.jobs(given, "meta", {})]
    assert len(keys) == len(set(keys))
    assert {key[0] for part, key in keys if part == "ops"} == set(command.OPS)


def test_contenders_take_turns():
    calls = []

    def named(name):
        return timing.Contender(lambda: calls.append(name), lambda _: time.sleep(2e-4))

    found = timing.measure({name: named(name) for name in "abc"}, "cpu", timing.Pace(4, 1e-6, 1.0))
    assert [name for name, _ in itertools.groupby(calls)][-12:] == list("abc") * 4
    assert all(len(times.both) == 4 and min(times.backward) >= 2e-4 for times in found.values())


@pytest.fixture
def sleep(monkeypatch):
    """Sleeps on a clock of its own, which nothing else on the machine can delay."""
    now = [0.0]

    def pass_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return pass_time


def test_first_step_of_a_turn_is_not_counted(sleep):
    """It pays for what the contender before has left."""
    last = []

    def step(name):
        sleep(1e-4 if last == [name] else 0.01)
        last[:] = [name]

    found = timing.measure(
        {name: timing.Contender(lambda n=name: step(n), lambda _: None) for name in "ab"},
        "cpu",
        timing.Pace(3, 1e-6, 1),
    )
    assert all(max(times.forward) < 2e-4 for times in found.values())


@pytest.mark.parametrize(("first", "kept"), [(2e-3, 3), (2e-2, 2)])
def test_long_steps_count_but_one_that_sets_things_up(first, kept, sleep, monkeypatch):
    monkeypatch.setattr(timing, "LONG", 1e-3)
    calls = []

    def step():
        calls.append(1)
        sleep(first if len(calls) == 1 else 2e-3)

    found = timing.measure({"a": timing.Contender(step, lambda _: None)}, "cpu", timing.Pace(9, 1e-6, 1e-6))
    assert (len(found["a"].both), len(calls)) == (kept, 3)
    assert max(found["a"].both) < 1.5e-2


def run_alone(arguments, environment):
    """Python in a process of its own."""
    environment = environment | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr


AHEAD = """
if __name__ == "__main__":  # what its processes do not need is imported here
    from torch._inductor.graph import GraphLowering
    from bench import __main__ as command, measure, precompile, timing

    precompile.MOST = 1  # one process compiles all, as each imports torch
    job = command.jobs(command.options(["kl_normal", "--quick", "--threads", "1"]), "cpu", {})[0]
    formula, idle = job.compiles
    assert (formula.without_data, idle.without_data) == (False, True)
    accounts, fails = {}, formula._replace(index=10**6)
    assert list(precompile.ahead([formula, fails], accounts)) == [1, 2]  # what fails is left to later
    generate, lowered = GraphLowering.codegen, []
    GraphLowering.codegen = lambda graph: lowered.append(graph) or generate(graph)
    with timing.threads(formula.threads):  # which is part of the code
        case, found, anew = precompile.case_of(formula), {}, {}
        function, note = measure.compiled(case, case.inputs, None, found, account=accounts[formula])
        assert (note, lowered) == ("", [])  # it was all there
        measure.compiled(case, case.inputs, None, anew)
        assert lowered and accounts == {formula: anew[measure.COMPILE]} and found == anew
    assert abs(function(*case.inputs) - case.eager(*case.inputs)) < 1e-5
"""


def test_formulas_are_compiled_ahead(tmp_path):
    """In processes of their own, which leave graphs and code where the one that measures finds them, and say what is in
    them. In a process of its own: what pytest does to this one is part of the graphs' names."""
    script = tmp_path / "ahead.py"
    script.write_text(AHEAD)
    run_alone([str(script)], dict(os.environ))


def test_compilation_ahead_leaves_no_process_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    formula = precompile.Formula("no_such_op", 0, True, 1, False)
    with torch.compiler.config.patch(cache_key_tag=""):  # monkeypatch would take the name away for good
        interrupted = precompile.ahead([formula, formula._replace(index=1), formula._replace(index=2)], {})
        next(interrupted)
        interrupted.close()
    assert not multiprocessing.active_children()


HEAP = """
import re
import torch
from bench import timing

def on_heap(size):
    tensor = torch.empty(size, dtype=torch.uint8)
    with open("/proc/self/maps") as maps:
        ranges = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*\\[heap\\]$", maps.read(), re.M)
    return any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in ranges)

step = timing.Contender(lambda: torch.ones(1 << 18), lambda y: torch.cat([y.expand(64, -1), y.expand(64, -1)]))
torch.empty(31 << 20, dtype=torch.uint8)  # who ran before
for size in (8 << 20, 1 << 20):
    assert on_heap(size)
with timing.heap_of(step, "cpu"):
    assert on_heap(1 << 20)
    assert not on_heap(8 << 20)
assert on_heap(8 << 20)  # and so do others have it
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_heap_is_that_of_a_process_of_its_own():
    """A block as large as the step's largest of up to 32 MiB comes from the heap, a larger one is mapped. In a process
    of its own: what is free on this one's heap is used for blocks of any size."""
    run_alone(["-c", HEAP], os.environ)


def test_spread_and_ratio():
    assert timing.spread([3.0, 1.0, 2.0, 4.0, 5.0]) == (2, 3, 4)
    slow, fast = timing.Times([1.0, 2.0, 30.0], [1.0, 2.0, 30.0]), timing.Times([0.5, 1.0, 15.0], [0.5, 1.0, 15.0])
    assert timing.ratio(slow, fast) == (2, 2, 2)  # of rounds side by side, whatever the machine did between them


def test_copy_and_limit_move_what_they_should():
    from bench.budget import Budget
    from bench.counting import count_eager

    forward, backward = count_eager(*timing.copy(Budget(8000, 1600), "cpu"))
    assert (forward.bytes, backward.bytes) == (8000, 1600)
    inputs = [torch.ones(10, 10, requires_grad=True), torch.ones(5)]
    forward, backward = count_eager(*timing.limit([torch.ones(10)], inputs))
    assert (forward.read, forward.written) == (0, 40)
    assert (backward.read, backward.written) == (0, 400)
    large = timing.filled_like(torch.empty(timing.FRESH // 4 + 5))
    assert bool((large == 1).all())


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="has no large pages")
def test_the_limit_asks_for_large_pages_where_the_loops_do():
    """Else an op could pass the limit, which would be none."""
    like = torch.empty(timing.FRESH // 4)
    tensor = timing.filled_like(like)
    middle = tensor.data_ptr() + tensor.nbytes // 2
    region, asked = False, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split(" ")[0].split("-")
        if len(bounds) == 2:
            region = int(bounds[0], 16) <= middle < int(bounds[1], 16)
        elif region and line.startswith("VmFlags"):
            asked = "hg" in line.split()
    assert asked
