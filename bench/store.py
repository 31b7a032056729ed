"""The store of results: one folder per machine, with a CSV file per part, written after every case."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastkl.vae.facts import processor

HERE = Path(__file__).parent
KEY = ("op", "case")  # identifies a case, so that a resumed run skips it
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")


class Store:
    """part -> rows. With `keep`, stored rows stay until they are measured again."""

    def __init__(self, folder: Path, keep: bool):
        self.folder, self.parts = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        if keep:
            for path in folder.glob("*.csv"):
                with path.open(newline="", encoding="utf-8") as file:
                    self.parts[path.stem] = [{k: parse(v) for k, v in row.items()} for row in csv.DictReader(file)]

    def rows(self, part: str) -> list[dict[str, Any]]:
        return self.parts.get(part, [])

    def has(self, part: str, key: tuple[str, str]) -> bool:
        return any(key_of(row) == key for row in self.rows(part))

    def add(self, part: str, rows: list[dict[str, Any]]) -> None:
        new = {key_of(row) for row in rows}
        self.parts[part] = [row for row in self.rows(part) if key_of(row) not in new] + rows
        names = list(dict.fromkeys(name for row in self.parts[part] for name in row))
        temporary = self.folder / f".{part}.csv"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: rounded(value) for name, value in row.items()} for row in self.parts[part])
        temporary.replace(self.folder / f"{part}.csv")  # atomic, in case the run is killed

    def remember(self, machine: dict[str, Any]) -> None:
        (self.folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")


def key_of(row: dict[str, Any]) -> tuple[str, str]:
    return tuple(str(row[name]) for name in KEY)


def rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def parse(text: str) -> Any:
    if not NUMBER.fullmatch(text):
        return text
    return int(text) if text.lstrip("-").isdigit() else float(text)


def cache_bytes() -> int:
    """Size of the last-level cache, of the GPU if torch has one; 32 MiB if unknown."""
    if torch.cuda.is_available():
        return getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 32 << 20
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (OSError, ValueError, AttributeError):
        return 32 << 20


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The commit of the working tree, or the variable COMMIT; "" without git or a repository."""
    if given := os.environ.get("COMMIT"):
        return given
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def machine(device: str, thread_counts: list[int]) -> dict[str, Any]:
    """Facts about the machine and its state that readers of the results need."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cpu": processor(),
        "cores": cores(),
        "threads": thread_counts,
        "cache_mib": cache_bytes() >> 20,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        # Load of the minute before: other processes make the threads of an op wait for one another.
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def slug(machine: dict[str, Any], device: str) -> str:
    name = machine["device"] + ("" if device == "cuda" else f" {max(machine['threads'])} threads")
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")
