"""Device time of every op, forward, backward and both, against the eager formula, torch.compile and a copy.

    python -m bench.gpu --out timing.csv --seconds 150
    python -m bench.gpu --only mixture --no-compile

`bytes` are the op's traffic in that direction (bench/budget.py), the same for all contenders. Per cent of copy is the
time of a `Tensor.copy_` of as many bytes, measured in the same rounds, over the contender's. `triples` are useful (row,
component or row, dimension) per second. A contender that does not match the definition in float64 is not timed; if that
is fastkl, or if it fails, the exit status is 1. `how` is the method: a CUDA graph's replay, a step behind a backlog of
other work, or the wall clock on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import counting, device, workers
from bench.budget import budget
from bench.case import UNITS, as_list, disagreement, make_cotangents, problem, run
from bench.gpu_cases import MIB, Job, Timed, build, jobs
from bench.measure import COMPILE, COPY, contender
from bench.store import cores, processor, rounded
from bench.timing import Contender, copy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DRAWN = 16  # factor on the allowed error for noise, whose two implementations round differently
COLUMNS = ["card", "op", "case", "dtype", "contender", "direction", "ms", "ms_low", "ms_high", "how", "bytes"]
COLUMNS += ["gb_per_s", "percent_of_copy", "triples_per_s", "times_as_fast_as_eager", "peak_mib", "note"]
LINE = "{op:<22} {case:<20} {dtype:<8} {contender:<14}"


def truth(timed: Timed, cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients) of the definition in float64, computed by blocks of rows."""
    split = len(timed.inputs) - timed.shared
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in timed.inputs[split:]]
    outputs: list[Any] = []
    own: list[list[Tensor]] = []
    rest = [torch.zeros_like(x) for x in exact]
    for start in range(0, timed.rows, timed.block):
        at = slice(start, min(timed.rows, start + timed.block))
        rows = [x.detach()[at].double().requires_grad_(x.requires_grad) for x in timed.inputs[:split]]
        found = timed.part(at, rows, exact)
        found = [found] if isinstance(found, Tensor) else list(found)
        wanted = [x for x in (*rows, *exact) if x.requires_grad]
        incoming = [c.double() if timed.summed else c[at].double() for c in cotangents]
        gradients = list(torch.autograd.grad(found, wanted, incoming))
        for total, gradient in zip([t for t, x in zip(rest, exact) if x.requires_grad][::-1], gradients[::-1]):
            total += gradient
        own.append(gradients[: sum(x.requires_grad for x in rows)])
        outputs.append([x.detach() for x in found])
    join = sum if timed.summed else torch.cat
    gradients = [torch.cat(parts) for parts in zip(*own)] if own[0] else []
    return [join(parts) for parts in zip(*outputs)], gradients + [t for t, x in zip(rest, exact) if x.requires_grad]


def refusal(timed: Timed, name: str, cotangents: list[Tensor], function: Any, expected: Any) -> str:
    """The reason why a contender may not be timed, or "" if it matches the definition."""
    if timed.case is not None:
        return problem(timed.case, name, function, cotangents)
    checked = timed.checked.get(name, None if timed.checked else function)
    if checked is None:
        return ""  # torch.compile's noise is unknown; its eager formula was compared
    actual = run(checked, timed.inputs, cotangents)
    rounding = max(torch.finfo(x.dtype).eps for x in (*timed.inputs, *actual[0], *actual[1]))
    rounding *= DRAWN if timed.checked else 1
    return disagreement(actual, expected, max(rounding, timed.allowed.get(name, 0) / UNITS))


def contenders(timed: Timed, compile: bool) -> dict[str, Any]:
    """Contender -> function, with torch.compile if `compile`."""
    if not compile:
        return timed.functions
    torch._dynamo.reset()
    return timed.functions | {COMPILE: torch.compile(timed.functions["eager"], dynamic=False)}


def rows_of(job: Job, given: argparse.Namespace, flush: device.Flush) -> list[dict[str, Any]]:
    """A row for each contender and direction; one row with a note for a contender that may not be timed."""
    name, timed = build(job, DEVICE, given.small)
    facts = {"card": card(), "op": job.op, "case": name, "dtype": str(job.dtype).removeprefix("torch.")}
    outputs = [out.detach() for out in as_list(timed.functions["fastkl"](*timed.inputs))]
    cotangents = make_cotangents(outputs, timed.inputs)
    differentiates = any(x.requires_grad for x in timed.inputs)
    moved = budget(timed.budget, timed.inputs, outputs, cotangents) if timed.budget else None
    expected = truth(timed, cotangents) if timed.part else None
    notes, peaks, steps, rows = {}, {}, {}, []
    for who, function in contenders(timed, job.compile and given.compile).items():
        try:
            if note := refusal(timed, who, cotangents, function, expected):
                notes[who] = note
                continue
            steps[who] = contender(function, timed.inputs, cotangents)
            steps[who].both()
            peaks[who] = counting.peak_bytes(steps[who].both, DEVICE) / MIB
        except torch.cuda.OutOfMemoryError:
            notes[who] = "out of memory"
            steps.pop(who, None)
        except Exception as error:
            notes[who] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
            steps.pop(who, None)
    del expected
    release()
    turns = {}
    for who, step in {**steps, **({COPY: copy(moved, DEVICE)} if moved else {})}.items():
        try:
            small = not CUDA or peaks.get(who, 0) * MIB < torch.cuda.get_device_properties().total_memory / 16
            made = device.turns_of(step, DEVICE, differentiates, graphs=small)
            if not small:
                release()
        except torch.cuda.OutOfMemoryError:
            notes[who] = "out of memory"
            continue
        except Exception as error:
            notes[who] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
            continue
        turns |= {(who, direction): turn for direction, turn in made.items()}
    times = device.measure(turns, flush, given.rounds, given.case_seconds)
    for (who, direction), found in times.items():
        row = {**facts, "contender": who, "direction": direction, "ms": found.median, "how": found.how}
        row |= {"ms_low": found.low, "ms_high": found.high, "peak_mib": peaks.get(who, "")}
        if moved:
            row["bytes"] = getattr(moved, direction)
            row["gb_per_s"] = row["bytes"] / found.median / 1e6
        if (COPY, direction) in times:
            row["percent_of_copy"] = 100 * times[COPY, direction].median / found.median
        if timed.triples:
            row["triples_per_s"] = 1e3 * timed.triples / found.median
        if ("eager", direction) in times:
            row["times_as_fast_as_eager"] = times["eager", direction].median / found.median
        rows.append(row)
    notes |= {who: "out of memory" for who, direction in turns if (who, direction) not in times and who != COPY}
    return rows + [{**facts, "contender": who, "note": note} for who, note in notes.items()]


def card() -> str:
    """The device's name, part of every row."""
    return torch.cuda.get_device_name() if CUDA else processor()


def release() -> None:
    """Free cached memory for the next case's graphs."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def yardsticks(flush: device.Flush, small: bool) -> list[dict[str, Any]]:
    """Times of a large copy, of a graph with one trivial kernel, and of a graph that draws one number: torch adds two
    kernels, which set seed and offset, to every graph that draws."""
    size = MIB if small else 256 * MIB
    source, nothing = torch.ones(size // 8, device=DEVICE), torch.ones(1, device=DEVICE)
    target = torch.empty_like(source)
    steps = {COPY: lambda: target.copy_(source), "one empty kernel": lambda: nothing.add_(1)}
    steps["one drawn number"] = lambda: nothing.uniform_()
    rows = []
    for name, step in steps.items():
        turns = device.turns_of(Contender(step, lambda _: []), DEVICE, differentiates=False)
        found = device.measure(turns, flush, 25, 2.0)["forward"]
        row = {"card": card(), "op": name, "case": "", "dtype": "float32", "contender": name, "direction": "forward"}
        row |= {"ms": found.median, "ms_low": found.low, "ms_high": found.high, "how": found.how}
        if name == COPY:
            row |= {"bytes": size, "gb_per_s": size / found.median / 1e6, "percent_of_copy": 100.0}
        rows.append(row)
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each contender."""
    by_contender: dict[str, list[str]] = {}
    for row in rows:
        parts = by_contender.setdefault(LINE.format(**row), [])
        if row.get("note"):
            parts.append(f"NOT TIMED: {row['note']}")
            continue
        share = f" {row['percent_of_copy']:3.0f} %" if "percent_of_copy" in row else ""
        speed = f" {row['triples_per_s'] / 1e12:.3g}e12/s" if "triples_per_s" in row else ""
        mark = "" if row["how"] in ("graph", "wall") else f" ({row['how']})"
        parts.append(f"{row['direction']} {row['ms']:.4g} ms{share}{speed}{mark}")
    return [f"{head}  {'  '.join(parts)}" for head, parts in by_contender.items()]


def prepare(task: tuple[Job, bool, bool]) -> None:
    """Compile the kernels of a case into the caches of Triton and Inductor."""
    job, small, compile = task
    _, timed = build(job, DEVICE, small)
    functions = contenders(timed, job.compile and compile)
    for name, function in functions.items():
        if name != "eager":
            outputs = as_list(function(*timed.inputs))
            step = contender(function, timed.inputs, make_cotangents(outputs, timed.inputs))
            step.both()
    release()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("timing.csv"))
    parser.add_argument("--only", nargs="+", help="time only these ops")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after this many seconds")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--case-seconds", type=float, default=2.0, help="time limit for the rounds of one case")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes that compile ahead; 1: none")
    given = parser.parse_args(arguments)
    began, status, done = time.monotonic(), 0, 0
    work = [job for job in jobs(given.small) if not given.only or job.op in given.only]
    if given.jobs > 1:
        tasks = [(job, given.small, given.compile) for job in work]
        workers.report("cases", workers.ahead(prepare, tasks, given.jobs, 0.4 * given.seconds), len(tasks))
    flush = device.Flush(DEVICE)
    with given.out.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()

        def add(rows: list[dict[str, Any]]) -> None:
            out.writerows({key: rounded(value) for key, value in row.items()} for row in rows)
            file.flush()
            print(*lines(rows), sep="\n", flush=True)

        add(yardsticks(flush, given.small))
        for job in work:
            if time.monotonic() - began > given.seconds:
                break
            try:
                rows = rows_of(job, given, flush)
            except Exception as error:  # the other cases can still be timed
                note = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
                rows = [{"card": card(), "op": job.op, "case": f"{job.mib} MiB", "dtype": str(job.dtype)}]
                rows[0] |= {"contender": "fastkl", "note": note}
            add(rows)
            done += 1
            status |= any("fastkl" in row["contender"] and row.get("note") for row in rows)
            release()
    print(f"{card()}: {done} of {len(work)} cases timed, {time.monotonic() - began:.0f} s", flush=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
