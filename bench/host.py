"""The host's time per call: microseconds to launch a small step, forward and backward, without waiting for the device.

    python -m bench.host --out host.csv

The contenders on each op's smallest case are the eager formula and fastkl. They are interleaved; the figures are
medians over rounds.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.case import as_list, make_cotangents
from bench.measure import contender
from bench.store import HERE, processor, rounded

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
COLUMNS = ["card", "op", "case", "contender", "host_us", "times_eager", "note"]


def microseconds(step: Callable[[], object], calls: int) -> float:
    """The time of one call by the host's clock. The device is idle before, and its queue never fills up."""
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        step()
    return 1e6 * (time.perf_counter() - began) / calls


def measure(steps: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Median microseconds of each step, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            spent = microseconds(step, calls if number else 4)  # the first round compiles and is not counted
            if number:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def rows_of(op: str, card: str, rounds: int, calls: int) -> list[dict]:
    """A row for each contender."""
    case = next(iter(importlib.import_module(f"bench.bench_{op}").cases(DEVICE, True)))
    functions = {"eager": case.eager, "fastkl": case.fastkl}
    steps = {}
    for name, function in functions.items():
        cotangents = make_cotangents(as_list(function(*case.inputs)), case.inputs)
        steps[name] = contender(function, case.inputs, cotangents).both
    times = measure(steps, rounds, calls)
    facts = {"card": card, "op": op, "case": case.name}
    return [{**facts, "contender": n, "host_us": t, "times_eager": t / times["eager"]} for n, t in times.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("host.csv"))
    parser.add_argument("--only", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=50, help="calls per round")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no op after this many seconds")
    given = parser.parse_args(arguments)
    card = torch.cuda.get_device_name() if CUDA else processor()
    began, status = time.monotonic(), 0
    print(*["no GPU: the time includes the computation, not only the host's work"] * (not CUDA))
    print(card)
    with given.out.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        for op in given.only:
            if time.monotonic() - began > given.seconds:
                print(f"no time left for {op} and later ops")
                break
            try:
                rows = rows_of(op, card, given.rounds, given.calls)
                words = [f"{row['contender']} {row['host_us']:.0f} us" for row in rows]
            except Exception as error:
                words = [f"FAIL {type(error).__name__}: {error}".splitlines()[0][:200]]
                rows, status = [{"card": card, "op": op, "note": words[0]}], 1
            out.writerows({key: rounded(value) for key, value in row.items()} for row in rows)
            file.flush()
            print(f"{op:<22} {rows[0].get('case', ''):<28} {'   '.join(words)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
