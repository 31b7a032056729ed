"""Checkpoints and atomic writes: after a crash at any moment, each file has either its old or its new content."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastkl.vae import sharded_parts
from fastkl.vae.data.arrays import BROKEN, first_line
from fastkl.vae.data.files import load_tensors
from fastkl.vae.errors import UserError

NAME = "checkpoint.pt"
FORMAT = "fastkl.vae 5"
PARTS = (
    "format",
    "settings",
    "fingerprint",
    "shape",
    "scaling",
    "ranks",
    "threads",
    "step",
    "seconds",
    "model",
    "optimizers",
    "discriminator",
    "average",
    "best",
    "scaler",
    "window",
    "watch",
    "guard",
    "history",
)


def write(path: Path, content: bytes | memoryview) -> None:
    """Replace the file in one step: a temporary file beside it, synchronised to the disk, then renamed over it.

    The temporary file is in the same folder, because a rename is atomic only within a file system. It is synchronised
    first; otherwise a power cut could leave the new name with an empty file.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private to the owner; results follow the umask as other files do.
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; the old file is unchanged") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def save(folder: Path, state: dict[str, Any]) -> None:
    write(folder / NAME, serialised(state))


def serialised(state: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint."""
    # In memory first: torch's writer reports a full disk as an internal error, or aborts.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getbuffer()


def load(folder: Path, whole: bool = True) -> dict[str, Any]:
    """The state in a run's folder. `whole`: with the tensors of a sharded run.

    Raises:
        UserError: the folder has no checkpoint, or a damaged or foreign one.
    """
    path = folder / NAME
    try:
        state = load_tensors(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except BROKEN as error:
        raise UserError(f"{path} is truncated, or not a checkpoint of fastkl ({first_line(error)})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or (set(PARTS) - set(state)):
        raise UserError(
            f"{path} is not a checkpoint of this version of fastkl: another version, or another program wrote it"
        )
    if not whole or "sharded" not in state:
        return state
    return sharded_parts.whole(folder, state)


def prepare(folder: Path) -> None:
    """Make the run folder and check that it is writable, before the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (NAME, "settings.json", "run.json", "metrics.json", "report.html"):
            for leftover in folder.glob(f".{name}.*.tmp"):  # of a process killed during a write
                leftover.unlink()
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--out {folder}: the folder is not writable: {reason(error)}") from None


def reason(error: OSError) -> str:
    """The cause of an error of the system, in a few words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return error.strerror or str(error)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
