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


def ahead(function: Callable, items: list[Any], jobs: int, seconds: float) -> Iterator[tuple[Any, Any]]:
    """(item, function(item) or the exception) as they are done; ends after so many seconds, whatever is left."""
    began = time.monotonic()
    pool = ProcessPoolExecutor(min(jobs, cores(), MOST, len(items) or 1), multiprocessing.get_context("spawn"), quiet)
    try:
        waiting = {pool.submit(function, item): item for item in items}
        for future in as_completed(waiting, max(1.0, seconds - (time.monotonic() - began))):
            yield waiting[future], future.exception() or future.result()
    except TimeoutError:
        pass
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def quiet() -> None:
    """At the start of a process: Ctrl-C is for the one that waits for it, and so is every message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
