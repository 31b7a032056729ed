"""Compilation ahead of a measurement, in several processes, into the compilers' caches on disk."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from typing import Any

from bench.store import cores

MOST = 16  # processes, each of which imports torch and, on a GPU, has a context


def ahead(function: Callable, items: list[Any], jobs: int, seconds: float) -> Iterator[tuple[Any, str]]:
    """(item, its error or "") as function(item) ends; stops after so many seconds."""
    began = time.monotonic()
    pool = ProcessPoolExecutor(min(jobs, cores(), MOST, len(items) or 1), multiprocessing.get_context("spawn"), quiet)
    try:
        waiting = {pool.submit(error_of, function, item): item for item in items}
        for future in as_completed(waiting, max(1.0, seconds - (time.monotonic() - began))):
            died = future.exception()
            yield waiting[future], f"{type(died).__name__}: {died}" if died else future.result()
    except TimeoutError:
        pass
    finally:
        processes = list((pool._processes or {}).values())
        for process in processes:
            process.kill()
        for process in processes:  # waits, so that the GPU is free for the measurement
            process.join(5)
        pool.shutdown(cancel_futures=True)  # its thread reaps them as well: until it has, they count as alive


def error_of(function: Callable, item: Any) -> str:
    """The error of function(item) as text, or "": some exceptions cannot be pickled."""
    try:
        function(item)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def report(what: str, done: Iterator[tuple[Any, str]], total: int) -> None:
    """Wait for `ahead`, and print the number of successes and the errors. The measurement compiles the others again."""
    began, ended, problems = time.monotonic(), 0, []
    for item, error in done:
        ended += 1
        if error:
            problems.append(f"  {item}: {error}".splitlines()[0][:160])
    print(f"{ended - len(problems)} of {total} {what} compiled ahead in {time.monotonic() - began:.0f} s", flush=True)
    print(*problems[:10], sep="\n", end="\n" * bool(problems), flush=True)


def quiet() -> None:
    """Initialise a worker process: only the parent handles Ctrl-C and prints messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
