"""Measure the time, traffic and memory of fastkl on this machine.

    python -m bench [OP | sweeps | training_step ...] [--quick] [--resume] [--output DIR] [--threads N ...]

Each bench_<op>.py in this folder defines `cases(device, quick)`, which yields `Case`s. Every contender is first
compared with the definition in float64: a contender that does not match is not timed, and the exit status is 1. Results
are written to disk after every case; Ctrl-C ends a run, and --resume continues it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import matplotlib  # noqa: F401
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    sys.exit(f'the benchmark needs {error.name}, which is not installed: pip install -e ".[bench]"')

from bench import measure, sweeps, tables, training_step
from bench.precompile import Accounts, Formula, ahead
from bench.report import write_report
from bench.store import HERE, Store, cores, machine, slug
from bench.timing import BRISK, QUICK, Pace

OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
PARTS = ("sweeps", "training_step")
FIRST = ("kl_normal", "rsample_kl")  # the ops of the first table


class Job(NamedTuple):
    """A measurement whose rows go to the file of `part`, under `key`."""

    part: str
    key: tuple[str, str]
    work: Callable[[], tuple[list[dict[str, Any]], list[str]]]
    compiles: tuple[Formula, ...] = ()  # formulas that it compiles by torch.compile


def options(arguments: list[str] | None) -> argparse.Namespace:
    about = "Measure fastkl against eager PyTorch, torch.distributions and torch.compile on this machine."
    parser = argparse.ArgumentParser(prog="python -m bench", description=about)
    parser.add_argument("what", nargs="*", help=f"ops, {' or '.join(PARTS)} (default: everything)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, torch.compile of two ops only")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the results (default: bench/results/<device>)"
    )
    every = torch.get_num_threads()
    parser.add_argument(
        "--threads", type=int, nargs="+", metavar="N", default=sorted({1, every}),
        help=f"CPU threads; the table of sizes uses each number, all else the largest (default: 1 and {every})",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.what if name not in (*OPS, *PARTS)]:
        parser.error(f"unknown op {', '.join(unknown)}; expected {', '.join((*OPS, *PARTS))}")
    if min(given.threads) < 1:
        parser.error(f"--threads must be at least 1, got {min(given.threads)}")
    return given


def jobs(given: argparse.Namespace, device: str, accounts: Accounts) -> list[Job]:
    """All requested measurements, those of the first table first; `accounts` is filled before they run."""
    wanted, result = given.what or (*OPS, *PARTS), []
    counts = sorted(set(given.threads)) if device == "cpu" else [torch.get_num_threads()]
    for op in sorted(set(wanted) & set(OPS), key=lambda op: (op not in FIRST, op)):
        cases = Cases(op, device, given.quick, accounts)
        for index, case in enumerate(importlib.import_module(f"bench.bench_{op}").cases("meta", given.quick)):
            settings = {
                "device": device, "thread_counts": counts if case.headline or case.every_count else counts[-1:],
                "pace": QUICK if given.quick else Pace() if case.headline else BRISK,
                "host": index == 0, "compile": not given.quick or op in FIRST,
            }  # fmt: skip
            work = functools.partial(cases.rows_of, index, settings)
            compiles = [Formula(op, index, given.quick, threads, False) for threads in settings["thread_counts"]]
            if settings["host"] and case.headline:  # for the host's time on empty data
                compiles.append(Formula(op, index, given.quick, counts[-1], True))
            result.append(Job("ops", (op, case.name), work, tuple(compiles) if settings["compile"] else ()))
    if "sweeps" in wanted:
        for sweep in sweeps.SWEEPS.values():
            for size in sweep.sizes(given.quick):
                key = (sweep.name, f"{sweep.axis} = {size}")
                result.append(Job("sweeps", key, lambda s=sweep, x=size: sweeps.rows_of(s, x, device, counts[-1])))
    if "training_step" in wanted:
        key = (training_step.NAME, training_step.WHOLE)
        result.append(Job("training_step", key, lambda: training_step.rows_of(device, counts[-1])))
    return result


class Cases:
    """The cases of an op, each constructed only when it is measured, to bound the memory."""

    def __init__(self, op: str, device: str, quick: bool, accounts: Accounts):
        self.op, self.quick, self.accounts = op, quick, accounts
        self.made = enumerate(importlib.import_module(f"bench.bench_{op}").cases(device, quick))

    def rows_of(self, index: int, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        case = next(case for number, case in self.made if number == index)
        formulas = {n: Formula(self.op, index, self.quick, n, False) for n in settings["thread_counts"]}
        accounts = {n: self.accounts[formula] for n, formula in formulas.items() if formula in self.accounts}
        return measure.rows_of(self.op, case, **settings, accounts=accounts)


def work_off(work: list[Job], store: Store, console: Console, device: str, accounts: Accounts) -> list[str]:
    """Measure and store all jobs; returns a line for each contender that was not timed because it does not match."""
    wrong, formulas = [], [formula for job in work for formula in job.compiles]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        # No automatic refresh: its thread would disturb the timing.
        console=console, transient=True, disable=not console.is_terminal, auto_refresh=False,
    )  # fmt: skip
    with bar:
        if device == "cpu" and len(formulas) > 1 and cores() > 1:  # on a GPU Inductor itself compiles in parallel
            task = bar.add_task("torch.compile of the eager formulas".ljust(60), total=len(formulas))
            for done in ahead(formulas, accounts):
                bar.update(task, completed=done, refresh=True)
                if not console.is_terminal:
                    print(f"torch.compile  {done}/{len(formulas)}", file=sys.stderr, flush=True)
            bar.remove_task(task)
        task = bar.add_task("", total=len(work))
        for number, job in enumerate(work, 1):
            bar.update(task, description=f"{job.key[0]}  {job.key[1]}"[:60].ljust(60), refresh=True)
            began = time.perf_counter()
            rows, problems = job.work()
            if not console.is_terminal:
                took = f"{time.perf_counter() - began:.1f} s"
                print(f"{number}/{len(work)}  {'  '.join(job.key)}  {took}", file=sys.stderr, flush=True)
            store.add(job.part, rows)
            wrong += [f"{job.key[0]} {job.key[1]}: {problem}" for problem in problems]
            bar.advance(task)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # mutes the profiler's messages, as below the compiler's
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device, sorted(set(given.threads))) | {"quick": given.quick}
    folder = given.output or HERE / "results" / (slug(about, device) + ("-quick" if given.quick else ""))
    # With named ops, their rows are replaced and all others are kept.
    store, console = Store(folder, keep=given.resume or bool(given.what)), Console(stderr=True)
    accounts: Accounts = {}
    work = [job for job in jobs(given, device, accounts) if not (given.resume and store.has(job.part, job.key))]
    status, wrong = 0, []
    try:
        wrong = work_off(work, store, console, device, accounts)
    except KeyboardInterrupt:
        status = 130
        print("Interrupted; results are kept. The same command with --resume continues.", file=sys.stderr)
    store.remember(about)
    screen = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables.all_tables(store):
        screen.print(table.rich(), "")
    page = write_report(store, about)
    screen.print(f"{page}", highlight=False)
    for row in store.rows("ops"):
        if str(row.get("note", "")).startswith("failed") and row["provider"] == measure.COMPILE:
            print(f"NOT COMPILED: {row['op']} {row['case']}: {row['note']}", file=sys.stderr)
    for line in wrong:
        print(f"NOT TIMED: {line}", file=sys.stderr)
    return status or (1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
