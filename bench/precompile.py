"""torch.compile of the eager formulas ahead of the measurements, on all cores: else half of a run is a C++ compiler's.

Inductor keeps the code that it has compiled, and the process that measures finds it there.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch

from bench.case import empty
from bench.measure import compiled
from bench.store import cores

MOST = 8  # processes: each has a torch of its own


class Formula(NamedTuple):
    """One case's, for a number of threads, which is part of the code; `without_data` for what the host costs alone."""

    op: str
    index: int
    quick: bool
    threads: int
    without_data: bool


def ahead(formulas: list[Formula]) -> Iterator[int]:
    """Compiles all of them, and counts as they are done. Interrupted, it leaves no process behind."""
    pool = ProcessPoolExecutor(min(cores(), MOST), multiprocessing.get_context("spawn"), alone)
    try:
        waiting = [pool.submit(compile_one, formula) for formula in formulas]
        for done, future in enumerate(as_completed(waiting), 1):
            future.exception()  # what cannot be compiled is said where it is measured
            yield done
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def alone() -> None:
    """At the start of a process: Ctrl-C is for the one that waits for it, and so is what there is to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def compile_one(formula: Formula) -> None:
    torch.set_num_threads(formula.threads)
    cases = importlib.import_module(f"bench.bench_{formula.op}").cases("cpu", formula.quick)
    case = next(itertools.islice(cases, formula.index, None))
    compiled(case, empty(case.inputs) if formula.without_data else case.inputs, None, {})
