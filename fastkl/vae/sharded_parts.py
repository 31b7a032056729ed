"""Tensors of a sharded checkpoint, read back by torch.distributed.checkpoint; sharded.py writes them."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkl.vae.data.arrays import BROKEN, first_line
from fastkl.vae.errors import UserError

PARTS = ("model", "optimizers", "discriminator", "average")  # parts of the state with tensors that may be sharded
# The classes in a table of contents of tensors. A pickle may name any function, and loading it would call it.
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


def whole(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state with whole tensors on the CPU, read by this process alone."""
    return filled(folder, state, {}, None) if "sharded" in state else state


def filled(folder: Path, state: dict[str, Any], live: dict[str, Tensor], group: Any) -> dict[str, Any]:
    """The state with its tensors, sharded like the live ones of the same names, or else whole on the CPU.

    Raises:
        UserError: the folder of the tensors cannot be read, or is incomplete or foreign.
    """
    import torch.distributed.checkpoint as dcp

    path = folder / state["sharded"]
    try:
        tensors = {}
        for name, about in contents(path).state_dict_metadata.items():
            like = live.get(name)
            if like is not None and like.shape == about.size:
                tensors[name] = torch.zeros_like(like)
            else:
                tensors[name] = torch.empty(about.size, dtype=about.properties.dtype, device="cpu")
        with quiet():
            dcp.load(tensors, checkpoint_id=path, process_group=group, no_dist=group is None)
        return {part: fill(state[part], tensors) if part in PARTS else state[part] for part in state}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
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


@contextlib.contextmanager
def quiet():
    """A context without torch's warnings about its copies and reads, on which no user can act."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
