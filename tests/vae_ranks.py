"""Runs of several processes each, one after the other: `vae_ranks.py 2 train --steps 4 then 3 train --resume`.

torch is imported once, and the processes of a run are forked, which costs a tenth of a start by torchrun.
"""

import itertools
import os
import socket
import sys

import sklearn.datasets  # noqa: F401 (what a run of the digits imports)
import torch._dynamo  # noqa: F401 (what an optimiser imports at its first step)

from fastkl.vae.cli import main


def launch(size: int, options: list[str]) -> int:
    """The largest exit code of the processes; a process that a signal ended counts as 1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            code = 1
            try:
                code = main(options)
                sys.stdout.flush()
            finally:
                os._exit(code)
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    divided = itertools.groupby(sys.argv[1:], lambda word: word == "then")
    for size, *options in (list(words) for then, words in divided if not then):
        if code := launch(int(size), options):
            sys.exit(code)
