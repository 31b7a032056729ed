"""The provenance of a run, for its report: versions, device, data and command line."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastkl
from fastkl.vae import checkpoint
from fastkl.vae.data import Data
from fastkl.vae.folders import FACTS


def collect(arguments: list[str], data: Data, device: torch.device, processes: int) -> dict[str, Any]:
    """The facts of this start."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["fastkl", *arguments]),
        "folder": str(Path.cwd()),
        "data": data.source,
        "data_shape": [len(data.train), *data.shape],
        "data_fingerprint": data.fingerprint[:16],
        "fastkl": fastkl.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({processor()})",
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "unknown"


def commit() -> str | None:
    """The commit of the checkout that fastkl was imported from, with "+" if files differ from it; None if installed."""
    folder = Path(fastkl.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails for an installation inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def keep(folder: Path, facts: dict[str, Any]) -> None:
    """Append the facts of this start to those of earlier starts."""
    content = json.dumps({"starts": [*starts(folder), facts]}, indent=2) + "\n"
    checkpoint.write(folder / FACTS, content.encode())


def starts(folder: Path) -> list[dict[str, Any]]:
    """The facts of each start of the run in this folder, the latest last."""
    try:
        entries = json.loads((folder / FACTS).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # a missing or broken file of facts must not stop training
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
