"""The machine as it is found: card, driver, clocks, versions and commit, into a file beside the results.

python -m bench.about --out about.json
python -m bench.about --slug          # the card's name as a folder is called
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
    """What the driver says of each card; nothing is changed."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    return [dict(zip(ASKED, map(str.strip, line.split(",")))) for line in done.stdout.splitlines()]


def versions() -> dict[str, str]:
    """Of packages that a stage may need; "missing" where there is none."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def properties() -> dict[str, Any]:
    """What torch says of the card that it uses."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties()
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    return {name: getattr(found, name, "") for name in names} | {"cuda": torch.version.cuda}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--slug", action="store_true")
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
    print("GPU:", about["used"].get("name", "none; what follows runs on the CPU"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
