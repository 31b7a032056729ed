"""Run folders: choosing a folder for a new or resumed run, and locking it against other processes."""

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

HELD: set[int] = set()  # the handles of locked folders
RUNS = Path("runs")
SETTINGS, FACTS = "settings.json", "run.json"


class Claim:
    """A lock on a run folder, held until `release`; a new folder that is still empty is then removed.

    The operating system locks the folder itself, so the lock ends with the process, however that ends.
    """

    def __init__(self, folder: Path, fresh: bool = False):
        self.folder, self.fresh, self.handle = folder, fresh, None
        if fcntl is None:
            return
        try:
            self.handle = os.open(folder, os.O_RDONLY)
            HELD.add(self.handle)
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(f"{folder}: another process is training in this folder") from None
        except OSError:
            pass  # a file system without locks

    def release(self) -> None:
        """Unlock the folder. It may be called twice."""
        if self.fresh:
            with contextlib.suppress(OSError):  # not empty: the run wrote its files
                self.folder.rmdir()
        if self.handle is not None:
            HELD.discard(self.handle)
            os.close(self.handle)
            self.handle = None


def forget_locks() -> None:
    """Close the handles in a forked process. A worker that outlives a killed run by some seconds would otherwise keep
    the folder locked."""
    while HELD:
        os.close(HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget_locks)


def claim_new(out: Path | None, name: str) -> Claim:
    """A claim on the requested folder; else on runs/NAME, runs/NAME-2, ...: the first number above all existing ones.

    mkdir is atomic: of two runs that start at once, the second gets FileExistsError and takes the next number.
    """
    with report_errors(out or RUNS):
        if out is not None:
            refuse_taken(out)
            fresh = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            claim = Claim(out, fresh)
            try:
                refuse_taken(out)  # again, under the lock: another run may have begun in between
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
    """A claim on the requested folder of a run; else on that of the latest run of this name."""
    if out is None:
        held = [number for number, folder in numbered(name).items() if holds_run(folder)]
        if not held:
            raise UserError(f"--resume: no run in {RUNS / name}; give the run's folder by --out")
        out = numbered(name)[max(held)]
    elif not holds_run(out):
        runs = [str(folder) for folder in [*siblings(out), *siblings(RUNS / name)] if holds_run(folder)]
        near = difflib.get_close_matches(str(out), runs, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{out}: no run in this folder{hint}")
    with report_errors(out):
        return Claim(out)


def begun(folder: Path) -> dict[str, Any]:
    """The settings of a run that ended before its first checkpoint."""
    path = folder / SETTINGS
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}".splitlines()[0]) from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} does not hold the settings of a run")
    return saved


def refuse_taken(folder: Path) -> None:
    """Raise a UserError if the folder of a new run holds a run."""
    if holds_run(folder):
        raise UserError(f"--out {folder} holds a run; continue it by --resume, or choose another folder")


def holds_run(folder: Path) -> bool:
    return (folder / checkpoint.NAME).exists() or (folder / SETTINGS).exists()


def numbered(name: str) -> dict[int, Path]:
    """Number -> folder, for every folder called runs/NAME or runs/NAME-2, ..., also without a run."""
    pattern = re.compile(re.escape(name) + r"(?:-([1-9]\d*))?")
    matches = {folder: pattern.fullmatch(folder.name) for folder in siblings(RUNS / name)}
    return {int(match[1] or 1): folder for folder, match in matches.items() if match}


def siblings(folder: Path) -> list[Path]:
    """The files and folders beside a folder, and the folder itself."""
    with contextlib.suppress(OSError):
        return sorted(folder.parent.iterdir())
    return []


@contextlib.contextmanager
def report_errors(folder: Path):
    """A context that turns the errors of making a folder into UserErrors of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder}: the folder is not writable: {checkpoint.reason(error)}") from None
