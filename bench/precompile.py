"""torch.compile of the eager formulas ahead of the measurements, on all cores: else half of a run is a C++ compiler's.

Inductor keeps what it has compiled, and the process that measures finds it there. What it says of a graph it says only
when it compiles it: this run's graphs have a name of their own in its cache, so that none is from an earlier one.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch

from bench.case import Case, empty
from bench.measure import COMPILE, compiled
from bench.store import cores

MOST = 8  # processes: each has a torch of its own


class Formula(NamedTuple):
    """One case's, for a number of threads, which is part of the code; `without_data` for what the host costs alone."""

    op: str
    index: int
    quick: bool
    threads: int
    without_data: bool


Accounts = dict[Formula, dict[str, int] | None]


def ahead(formulas: list[Formula], accounts: Accounts) -> Iterator[int]:
    """Compiles all of them, and counts as they are done; what Inductor says of each goes to `accounts`. Interrupted, it
    leaves no process behind."""
    tag = torch.compiler.config.cache_key_tag = f"bench {time.time_ns()}"
    pool = ProcessPoolExecutor(min(cores(), MOST), multiprocessing.get_context("spawn"), alone, (tag,))
    try:
        waiting = {pool.submit(compile_one, formula): formula for formula in formulas}
        for done, future in enumerate(as_completed(waiting), 1):
            if not future.exception():  # what cannot be compiled is said where it is measured
                accounts[waiting[future]] = future.result()
            yield done
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def alone(tag: str) -> None:
    """At the start of a process: Ctrl-C is for the one that waits for it, and so is what there is to say."""
    torch.compiler.config.cache_key_tag = tag
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def case_of(formula: Formula) -> Case:
    cases = importlib.import_module(f"bench.bench_{formula.op}").cases("cpu", formula.quick)
    return next(itertools.islice(cases, formula.index, None))


def compile_one(formula: Formula) -> dict[str, int] | None:
    torch.set_num_threads(formula.threads)
    case, found = case_of(formula), {}
    compiled(case, empty(case.inputs) if formula.without_data else case.inputs, None, found, cached=True)
    return found.get(COMPILE)
