"""Runs of several processes each, one after the other: `vae_ranks.py 2 train --steps 4 then 3 train --resume`.

"2:7" are two processes of which the last one kills itself in the middle of step 7. "2 own FOLDER 4" trains a model
of the caller's for 4 steps, from Python.

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
import torch.distributed.nn
from vae_worker import die

with contextlib.suppress(ImportError):
    importlib.import_module("sklearn.datasets")  # what a run of the digits imports

from fastkl import vae
from fastkl.vae.cli import main


def own_model() -> vae.VAE:
    torch.manual_seed(5)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    decoder = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Unflatten(1, (1, 8, 8)))
    return vae.VAE(encoder, decoder, (1, 8, 8), (4,), "bernoulli")


def train_own(out: str, steps: str) -> int:
    """Train a model of the caller's, or go on with a new one; on several processes it is sharded. The exit code says
    whether the given model and the returned one have the same weights."""
    x = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"parallel": "fsdp", "noise": "datum", "global_batch_size": 20, "schedule": "constant", "log_every": 1}
    options |= {"resume": True} if os.path.exists(out) else {"prior": "gmm", "components": 3, "warm_up": 2}
    given = own_model()
    found = vae.train(x, out=out, model=given, steps=int(steps), **options).vae.state_dict()
    own = given.state_dict()
    return int(found.keys() != own.keys() or not all(torch.equal(found[name], own[name]) for name in own))


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
                code = train_own(*options[1:]) if options[0] == "own" else main(options)
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
