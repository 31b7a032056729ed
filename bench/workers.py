"""Work ahead of a measurement, in several processes: what compilers keep on disk is found there later."""

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

MOST = 16  # processes: each has a torch of its own, and on a GPU a context


def ahead(function: Callable, items: list[Any], jobs: int, seconds: float) -> Iterator[tuple[Any, str]]:
    """(item, what went wrong) as function(item) ends; stops after so many seconds, whatever is left."""
    began = time.monotonic()
    pool = ProcessPoolExecutor(min(jobs, cores(), MOST, len(items) or 1), multiprocessing.get_context("spawn"), quiet)
    try:
        waiting = {pool.submit(said, function, item): item for item in items}
        for future in as_completed(waiting, max(1.0, seconds - (time.monotonic() - began))):
            died = future.exception()
            yield waiting[future], f"{type(died).__name__}: {died}" if died else future.result()
    except TimeoutError:
        pass
    finally:
        processes = list((pool._processes or {}).values())
        for process in processes:
            process.kill()
        for process in processes:  # a GPU's memory is given back, and its clock is for what follows
            process.join(5)
        pool.shutdown(wait=False, cancel_futures=True)


def said(function: Callable, item: Any) -> str:
    """What went wrong, in words: some exceptions cannot be sent from one process to another."""
    try:
        function(item)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def report(what: str, done: Iterator[tuple[Any, str]], total: int) -> None:
    """Waits for `ahead`, and prints how many have ended and why others could not. They are tried again when they are
    due, where it counts."""
    began, ended, problems = time.monotonic(), 0, []
    for item, error in done:
        ended += 1
        if error:
            problems.append(f"  {item}: {error}".splitlines()[0][:160])
    print(f"{ended - len(problems)} of {total} {what} compiled ahead in {time.monotonic() - began:.0f} s", flush=True)
    print(*problems[:10], sep="\n", end="\n" * bool(problems), flush=True)


def quiet() -> None:
    """At the start of a process: Ctrl-C is for the one that waits for it, and so is every message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
