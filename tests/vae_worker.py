"""One process of torchrun: trains as `python -m fastkl.vae` does, and fails where threads of gloo outlive the group.
Started without torchrun, it forks two such processes.

With FASTKL_KILLS, such as "1:7 0:30", one process kills itself at each start by torchrun: here the process of rank 1 in
the middle of step 7, after the first restart that of rank 0 in step 30, and after the second one none.

Such a thread may let go of a tensor while the interpreter ends, which aborts the process once in many runs. Several
command lines, divided by the word "then", share a group, as a process cannot join a second time.
"""

import contextlib
import importlib
import itertools
import os
import signal
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 (what an optimiser imports at its first step)

from fastkl.vae import loop, parallel
from fastkl.vae.cli import main

from forked import fork

with contextlib.suppress(ImportError):
    importlib.import_module("sklearn.datasets")  # what a run of the digits imports


def in_turn(commands: list[list[str]]) -> int:
    """The exit code of the first that fails, or 0."""
    start, stop = parallel.start, parallel.stop
    ranks = start()
    parallel.start, parallel.stop = lambda: ranks, lambda ranks: None
    try:
        return next(filter(None, map(main, commands)), 0)
    finally:
        stop(ranks)


def die(rank: str, step: str) -> None:
    batch = loop.batch

    def dying(run):
        if run.step == int(step) and run.ranks.rank == int(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(run)

    loop.batch = dying


def work() -> int:
    kills, start = os.environ.get("FASTKL_KILLS", "").split(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    for kill in kills[start : start + 1]:
        die(*kill.split(":"))
    divided = itertools.groupby(sys.argv[1:], lambda word: word == "then")
    commands = [list(words) for then, words in divided if not then]
    code = main() if len(commands) == 1 else in_turn(commands)
    threads = [
        path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")
    ]  # none where there is no /proc
    if left := [name for name in threads if "gloo" in name]:
        print(f"threads that outlive the process group: {left}", file=sys.stderr)
        code = code or 3
    return code


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(work())
    fork(2, work)
