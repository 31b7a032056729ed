"""Facts about the machine for a file beside the results: card, driver, clocks, versions and commit.

python -m bench.about --out about.json
python -m bench.about --slug          # the card's name as the name of a folder
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.store import machine, slug

ASKED = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
ASKED += ("power.limit", "temperature.gpu", "persistence_mode", "ecc.mode.current", "mig.mode.current")
PACKAGES = ("triton", "numpy", "scipy", "pytest", "pytest-xdist", "hypothesis", "rich", "matplotlib", "tensorboard")


def cards() -> list[dict[str, str]]:
    """The driver's facts about each card; no setting is changed."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [dict(zip(ASKED, map(str.strip, line.split(",")))) for line in done.stdout.splitlines()]


def versions() -> dict[str, str]:
    """The versions of packages that a stage may need, or "missing"."""
    result = {}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "missing"
    return result


def properties() -> dict[str, Any]:
    """torch's facts about the card in use."""
    if not torch.cuda.is_available():
        return {}
    card = torch.cuda.get_device_properties()
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    return {name: getattr(card, name, "") for name in names} | {"cuda": torch.version.cuda}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file of the facts")
    parser.add_argument("--slug", action="store_true", help="only print the card's name, as the name of a folder")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device, [torch.get_num_threads()])
    if given.slug:
        print(slug(about, device))
        return 0
    about |= {"cards": cards(), "used": properties(), "packages": versions()}
    if given.out:
        given.out.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for name, value in about.items():
        print(f"{name}: {json.dumps(value)}")
    print("GPU:", about["used"].get("name", "none; all later stages run on the CPU"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
