"""Runs of several processes each, one after the other: `vae_ranks.py 2 train --steps 4 then 3 train --resume`.

"2:7" are two processes of which the last one kills itself in the middle of step 7.

torch is imported once, and the processes of a run are forked, which costs a tenth of a start by torchrun.
"""

import contextlib
import importlib
import itertools
import os
import signal
import socket
import sys
import traceback

import torch._dynamo
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.nn  # noqa: F401
from vae_worker import die

with contextlib.suppress(ImportError):
    importlib.import_module("sklearn.datasets")  # what a run of the digits imports

from fastkl.vae.cli import main


def launch(size: int, dying: str, options: list[str]) -> bool:
    """Whether the processes end as they should."""
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
            if dying and rank == size - 1:
                die(str(rank), dying)
            try:
                code = main(options)
                sys.stdout.flush()
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes[-1] == -signal.SIGKILL and 0 not in codes if dying else not any(codes)


if __name__ == "__main__":
    divided = itertools.groupby(sys.argv[1:], lambda word: word == "then")
    for word, *options in (list(words) for then, words in divided if not then):
        size, _, dying = word.partition(":")
        if not launch(int(size), dying, options):
            sys.exit(f"{word} processes did not end as they should")
