"""One process of torchrun: trains as `python -m fastkl.vae` does, and fails where threads of gloo outlive the group.
Started without torchrun, it forks two such processes.

Such a thread may let go of a tensor while the interpreter ends, which aborts the process once in many runs. Several
command lines, divided by the word "then", share a group, as a process cannot join a second time.
"""

import itertools
import os
import sys
from pathlib import Path

import sklearn.datasets  # noqa: F401 (what a run of the digits imports)
import torch._dynamo  # noqa: F401 (what an optimiser imports at its first step)

from fastkl.vae import parallel
from fastkl.vae.cli import main

from forked import fork


def in_turn(commands: list[list[str]]) -> int:
    """The exit code of the first that fails, or 0."""
    start, stop = parallel.start, parallel.stop
    ranks = start()
    parallel.start, parallel.stop = lambda: ranks, lambda ranks: None
    try:
        return next(filter(None, map(main, commands)), 0)
    finally:
        stop(ranks)


def work() -> int:
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
