"""Run folders: which one a run takes or goes on with, and that no other process writes there at the same time."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

from fastkl.vae import checkpoint
from fastkl.vae.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
SETTINGS, FACTS = "settings.json", "run.json"


class Claim:
    """A run folder that belongs to this process until `release`, which removes it if nothing was written there.

    The lock is the operating system's, on the folder itself: it ends with the process, however that ends.
    """

    def __init__(self, folder: Path, fresh: bool = False):
        self.folder, self.fresh, self.handle = folder, fresh, None
        if fcntl is None:
            return
        try:
            self.handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(f"--out {folder}: another process trains there at this moment") from None
        except OSError:
            pass  # a file system without locks

    def release(self) -> None:
        if self.fresh:
            with contextlib.suppress(OSError):  # it is not empty, as it should be
                self.folder.rmdir()
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def claim_new(out: Path | None, name: str) -> Claim:
    """The folder asked for; else runs/NAME, runs/NAME-2, ...: the first number above all that are there.

    Making a folder is atomic: of two runs that start at once, the second finds it made and takes the next number.
    """
    with said(out or RUNS):
        if out is not None:
            refuse_taken(out)
            fresh = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            claim = Claim(out, fresh)
            try:
                refuse_taken(out)  # by a run that began in between
            except UserError:
                claim.fresh = False
                claim.release()
                raise
            return claim
        RUNS.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(max(numbered(name), default=0) + 1):
            folder = RUNS / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return Claim(folder, fresh=True)
    raise AssertionError


def claim_old(out: Path | None, name: str) -> Claim:
    """The run in the folder asked for, else the latest of its name."""
    if out is None:
        held = [number for number, folder in numbered(name).items() if holds_run(folder)]
        if not held:
            raise UserError(f"--resume: there is no run {RUNS / name}; name the folder of the run by --out")
        out = numbered(name)[max(held)]
    elif not holds_run(out):
        runs = [str(folder) for folder in [*siblings(out), *siblings(RUNS / name)] if holds_run(folder)]
        near = difflib.get_close_matches(str(out), runs, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--resume --out {out}: no run is there{hint}")
    with said(out):
        return Claim(out)


def begun(folder: Path) -> dict[str, Any]:
    """The settings of a run that ended before its first checkpoint."""
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}".splitlines()[0]) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold the settings of a run")
    return found


def refuse_taken(folder: Path) -> None:
    if holds_run(folder):
        raise UserError(f"--out {folder} holds a run; go on with it by --resume, or choose another folder")


def holds_run(folder: Path) -> bool:
    return (folder / checkpoint.NAME).exists() or (folder / SETTINGS).exists()


def numbered(name: str) -> dict[int, Path]:
    """Number -> folder, of all that are called runs/NAME or runs/NAME-2, ..., whatever is in them."""
    pattern = re.compile(re.escape(name) + r"(?:-([1-9]\d*))?")
    found = {folder: pattern.fullmatch(folder.name) for folder in siblings(RUNS / name)}
    return {int(match[1] or 1): folder for folder, match in found.items() if match}


def siblings(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.parent.iterdir())
    return []


@contextlib.contextmanager
def said(folder: Path):
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there: {checkpoint.reason(error)}") from None
