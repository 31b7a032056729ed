"""Checkpoints of a sharded run: each process writes its part of the tensors, by torch.distributed.checkpoint.

`checkpoint/step-N/` has the tensors of a step, and checkpoint.pt has all the rest and the name of this folder. It is
replaced only when the folder is complete, so after a crash at any moment it names a complete one. One process writes
checkpoint.pt alone: it is then one file, replaced in one step.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from fastkl.vae import checkpoint
from fastkl.vae.arrays import BROKEN, first_line
from fastkl.vae.errors import UserError

if TYPE_CHECKING:
    from fastkl.vae.parallel import Ranks

FOLDER = "checkpoint"
KEPT = 2  # folders: the newest, and the one before
PARTS = ("model", "optimizers", "discriminator", "average")  # of the state, with tensors that may be sharded
# All that a table of contents of tensors consists of. A pickle may name any function, and loading it would call it.
NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
}  # fmt: skip


class Shards:
    """The writer of a run: it copies the tensors, and writes them while the training goes on."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder, self.ranks = folder, ranks
        # A group of its own: the thread that writes must not share one with the steps.
        self.group = distributed.new_group(backend="gloo")
        self.pending: tuple[Any, bytes] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Begin to write, a collective call. The last one has ended by then."""
        import torch.distributed.checkpoint as dcp

        self.finish()
        name, tensors = f"{FOLDER}/step-{state['step']}", {}
        rest = {part: take(state[part], part, tensors) if part in PARTS else state[part] for part in state}
        # Serialised now: the curves grow while the tensors are written.
        content = checkpoint.serialised({**rest, "sharded": name})
        with reported(self.folder), quiet():
            future = dcp.async_save(tensors, checkpoint_id=self.folder / name, process_group=self.group)
        self.pending = future, content

    def poll(self) -> None:
        """Name the folder in checkpoint.pt if it is complete."""
        if self.pending is not None and self.pending[0].done():
            self.finish()

    def finish(self) -> None:
        if self.pending is None:
            return
        (future, content), self.pending = self.pending, None
        with reported(self.folder):
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
        """The state with tensors that are sharded as the live ones of the same names, a collective call."""
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


def whole(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state with whole tensors on the CPU, read by this process alone."""
    return filled(folder, state, {}, None) if "sharded" in state else state


def filled(folder: Path, state: dict[str, Any], live: dict[str, Tensor], group: Any) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    path = folder / state["sharded"]
    try:
        tensors = {}
        for name, about in contents(path).state_dict_metadata.items():
            like = live.get(name)
            sharded = like is not None and like.shape == about.size
            size, dtype = about.size, about.properties.dtype
            tensors[name] = torch.zeros_like(like) if sharded else torch.empty(size, dtype=dtype, device="cpu")
        with quiet():
            dcp.load(tensors, checkpoint_id=path, process_group=group, no_dist=group is None)
        return {part: fill(state[part], tensors) if part in PARTS else state[part] for part in state}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {checkpoint.reason(error)}") from None
    except (*BROKEN, AttributeError, dcp.CheckpointException) as error:
        raise UserError(f"{path} is incomplete, or not a checkpoint of fastkl ({first_line(error)})") from None


class Contents(pickle.Unpickler):
    """A reader of a table of contents that calls nothing but the constructors of its parts."""

    def find_class(self, module: str, name: str) -> Any:
        if name in NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError("it holds Python objects, which are not loaded because they can run code")


def contents(path: Path) -> Any:
    """The table of contents, read before torch reads it: torch would execute code in it."""
    with open(path / ".metadata", "rb") as stream:
        return Contents(stream).load()


def take(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The nested value with the names of its tensors, which are added to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: take(part, f"{name}/{key}", tensors) for key, part in value.items()}
    return value


def fill(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The reverse of `take`."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        return tensors[value["tensor"]]
    return {key: fill(part, tensors) for key, part in value.items()}


def folders(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("step-*"), key=step_of)


def step_of(folder: Path) -> int:
    number = folder.name.partition("-")[2]
    return int(number) if number.isdigit() else -1


@contextlib.contextmanager
def reported(folder: Path):
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        causes = [failure[0] for failure in getattr(error, "failures", {}).values()]
        cause: Any = causes[0] if causes else error
        why = checkpoint.reason(cause) if isinstance(cause, OSError) else first_line(cause)
        raise UserError(f"{folder / FOLDER} cannot be written: {why}; the old checkpoint is unchanged") from None


@contextlib.contextmanager
def quiet():
    """A context without torch's warnings about how it copies and reads, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
