"""Processes of one group without torchrun: they are forked, so torch is imported once, which is most of their time."""

import os
import signal
import sys
from collections.abc import Callable

from torch.distributed import TCPStore


def fork(count: int, work: Callable[[], int | None]) -> None:
    """Run work() in `count` processes that find each other as those of torchrun do, and exit with a code of 1 if one
    fails. Then the others are killed: they would wait for it."""
    reading, writing = os.pipe()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            port = os.read(reading, 5).decode().strip()
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            own |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
            os.environ.update({name: str(value) for name, value in own.items()})
            sys.exit(work())  # at the end of the interpreter, too, nothing may abort
        children.append(child)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after the fork: it has threads
    os.write(writing, f"{store.port:5}".encode() * count)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            for other in children:
                os.kill(other, signal.SIGKILL)
    sys.exit(failed)
