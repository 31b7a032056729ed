"""torch.compile of the eager formulas ahead of the measurements, on all cores: the C++ compiler takes half of a run.

The measuring process finds the graphs in Inductor's cache. Inductor gives its account of a graph only when it compiles
it, so each run has its own key in the cache, and no graph is from an earlier run.
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

MOST = 8  # processes, each of which imports torch


class Formula(NamedTuple):
    """A case's eager formula for a number of threads, on which the code depends; `without_data`: on empty data."""

    op: str
    index: int
    quick: bool
    threads: int
    without_data: bool


Accounts = dict[Formula, dict[str, int] | None]


def ahead(formulas: list[Formula], accounts: Accounts) -> Iterator[int]:
    """Compile all formulas, yield the number done, and add Inductor's account of each to `accounts`. An interrupt ends
    all processes."""
    tag = torch.compiler.config.cache_key_tag = f"bench {time.time_ns()}"
    pool = ProcessPoolExecutor(min(cores(), MOST), multiprocessing.get_context("spawn"), alone, (tag,))
    try:
        waiting = {pool.submit(compile_one, formula): formula for formula in formulas}
        for done, future in enumerate(as_completed(waiting), 1):
            if not future.exception():  # the measurement will report a failure to compile
                accounts[waiting[future]] = future.result()
            yield done
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def alone(tag: str) -> None:
    """Initialise a worker process: only the parent handles Ctrl-C and prints messages."""
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
