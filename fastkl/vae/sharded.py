"""Checkpoints of a sharded run: each process writes its part of the tensors, by torch.distributed.checkpoint.

`checkpoint/step-N/` has the tensors of a step, and checkpoint.pt has all the rest and the name of this folder.
checkpoint.pt is replaced only when the folder is complete, so after a crash at any moment it names a complete one. A
run that is not sharded has checkpoint.pt alone.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

from fastkl.vae import checkpoint
from fastkl.vae.data.arrays import first_line
from fastkl.vae.errors import UserError
from fastkl.vae.sharded_parts import PARTS, fill, filled, quiet, take

if TYPE_CHECKING:
    from fastkl.vae.parallel import Ranks

FOLDER = "checkpoint"
KEPT = 2  # folders: the newest, and the one before


class Shards:
    """The writer of a run: it copies the tensors, and writes them while the training goes on."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        # A group of its own: the thread that writes must not share one with the steps.
        self.group = distributed.new_group(backend="gloo")
        self.pending: tuple[Any, bytes | memoryview] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Begin to write a checkpoint, a collective call. It first waits for the end of the write before."""
        import torch.distributed.checkpoint as dcp

        self.finish()
        tensors: dict[str, Tensor] = {}
        name = f"{FOLDER}/step-{state['step']}"
        rest = {part: take(state[part], part, tensors) if part in PARTS else state[part] for part in state}
        # Serialised now: the curves grow while the tensors are written.
        content = checkpoint.serialised({**rest, "sharded": name})
        with report_errors(self.folder), quiet():
            future = dcp.async_save(tensors, checkpoint_id=self.folder / name, process_group=self.group)
        self.pending = future, content

    def poll(self) -> None:
        """Name the folder in checkpoint.pt if it is complete."""
        if self.pending is not None and self.pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the tensors, then write checkpoint.pt and remove old folders."""
        if self.pending is None:
            return
        (future, content), self.pending = self.pending, None
        with report_errors(self.folder):
            future.result()
        if self.ranks.main:
            checkpoint.write(self.folder / checkpoint.NAME, content)
            for old in folders(self.folder)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)

    def clean(self, state: dict[str, Any] | None) -> None:
        """Remove folders that a killed run has left incomplete."""
        for folder in folders(self.folder):
            if step_of(folder) > (state["step"] if state else -1):
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, state: dict[str, Any], live: dict[str, Tensor]) -> dict[str, Any]:
        """The state with tensors that are sharded like the live ones of the same names, a collective call."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if "sharded" in state:
            return filled(self.folder, state, live, self.group)
        tensors: dict[str, Tensor] = {}
        rest = {part: take(state[part], part, tensors) if part in PARTS else state[part] for part in state}
        for name, value in tensors.items():
            like = live.get(name)
            if isinstance(like, DTensor) and like.shape == value.shape:
                own = value.to(like.device)
                tensors[name] = distribute_tensor(own, like.device_mesh, like.placements, src_data_rank=None)
        return {part: fill(rest[part], tensors) if part in PARTS else rest[part] for part in rest}


def folders(folder: Path) -> list[Path]:
    """The folders of the tensors in a run's folder, the oldest first."""
    return sorted((folder / FOLDER).glob("step-*"), key=step_of)


def step_of(folder: Path) -> int:
    number = folder.name.partition("-")[2]
    return int(number) if number.isdigit() else -1


@contextlib.contextmanager
def report_errors(folder: Path):
    """A context that turns the errors of a write into UserErrors of one line."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        causes = [failure[0] for failure in getattr(error, "failures", {}).values()]
        cause: Any = causes[0] if causes else error
        why = checkpoint.reason(cause) if isinstance(cause, OSError) else first_line(cause)
        raise UserError(f"{folder / FOLDER} cannot be written: {why}; the old checkpoint is unchanged") from None
