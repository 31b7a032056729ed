"""Compile kernels ahead of time on a machine without a GPU, with whichever Triton is installed.

    TRITON_INTERPRET=0 python tests/aot.py test_kl_normal test_rsample_kl --targets sm_90 gfx942

takes these modules' `aot_calls()` (name -> a call of a launcher), compiles every launch with Triton's specialisation
for the target instead of running it, and prints one JSON line per kernel and target: spills, shared memory, the width
of global loads and stores, or the error. `test_compiled.py` checks them for one target, `compat.py` for all targets and
several versions of Triton. Only calls named "core ..." are compiled; --all compiles every call, --first N the first N
core calls of each module.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers import TARGETS

HERE = Path(__file__).parent
SHARED_LIMIT = 64 * 1024  # bytes; gfx942 has the smallest
FILES = [path for path in HERE.rglob("test_*.py") if "\ndef aot_calls" in path.read_text()]
MODULES = sorted(path.stem for path in FILES)
sys.path += sorted({str(path.parent) for path in FILES})


class Driver:
    """A stand-in for Triton's driver with one target and no device: enough for `kernel.warmup`."""

    devices = itertools.count()  # Triton caches kernels per device

    def __init__(self, target) -> None:
        self.target, self.device = target, next(self.devices)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(name: str, receive: Callable[[Any, Any, dict], None]) -> Iterator[None]:
    """In this context a launch compiles its kernel for the target `name` and does not run it. `receive` gets the
    compiled kernel, its function, and the launch's keyword arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    original, before, backend = JITFunction.run, None, TARGETS[name][0]
    with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to restore
        before = driver.active

    def run(self, *args, grid, warmup=False, **kwargs):
        options = kwargs
        if backend == "hip":  # where launchers omit it
            options = {option: value for option, value in kwargs.items() if option != "maxnreg"}
        receive(original(self, *args, grid=grid, warmup=True, **options), self, kwargs)

    driver.set_active(Driver(GPUTarget(*TARGETS[name])))
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original
        if before is not None:
            driver.set_active(before)


def describe(kernel, target: str) -> dict:
    """Spills, bytes of shared memory, and how many global loads and stores move 16 bytes or more for each thread."""
    if TARGETS[target][0] == "hip":
        code = kernel.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers, not to memory.
        spills = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", code))
        wide = [len(re.findall(rf"\b(?:global|buffer)_{what}_dwordx4", code)) for what in ("load", "store")]
    else:
        # The stack frame contains only spills.
        spills = sum(int(n) for n in re.findall(r"STACK:(\d+)", resources(kernel.asm["cubin"])))
        # ptxas keeps these widths, and disassembling its output would take as long as compiling.
        accesses = [re.findall(rf"\b{what}\.global\S*?\.v(\d)\.b(\d+)", kernel.asm["ptx"]) for what in ("ld", "st")]
        wide = [sum(int(count) * int(bits) >= 128 for count, bits in found) for found in accesses]
    return {"spills": spills, "shared": kernel.metadata.shared, "wide_loads": wide[0], "wide_stores": wide[1]}


def resources(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout


def faults(record: dict) -> list[str]:
    """The faults of a compiled launch. Calls with "aligned" in their name have rows of whole 16-byte runs."""
    if "error" in record:
        return [record["error"]]
    found, kernel = [], record["kernel"]
    if record["spills"]:
        found.append(f"{kernel} spills {record['spills']} bytes")
    if record["shared"] > SHARED_LIMIT:
        found.append(f"{kernel} takes {record['shared']} bytes of shared memory")
    # A tile may be too small for the 64 lanes of gfx942, which then move 8 bytes each.
    small = "32 lanes" in record["call"] and record["target"] == "gfx942"
    if "aligned" in record["call"] and not small:
        if not record["wide_loads"]:
            found.append(f"{kernel} does not load 16 bytes at a time")
        if not record["wide_stores"] and ("bwd" in kernel or "rsample" in kernel):
            found.append(f"{kernel} does not store 16 bytes at a time")
    return found


def compile_module(module: str, target: str, every: bool, first: int | None = None) -> list[dict]:
    records: list[dict] = []
    warnings.simplefilter("ignore")
    calls = importlib.import_module(module).aot_calls()
    chosen = list(calls) if every else [name for name in calls if name.startswith("core")][:first]
    for name in chosen:
        launch = calls[name]
        about = {"module": module, "call": name, "target": target}

        def receive(kernel, function, options, about=about):
            records.append({**about, "kernel": function.__name__, **describe(kernel, target)})

        try:
            with compiling(target, receive):
                launch()
        except Exception as error:
            records.append({**about, "error": f"{type(error).__name__}: {error}"[:2000]})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=["sm_90"])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--first", type=int)
    options = parser.parse_args()
    jobs = itertools.product(options.modules, options.targets)
    compile_chosen = functools.partial(compile_module, every=options.all, first=options.first)
    with concurrent.futures.ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for records in pool.map(compile_chosen, *zip(*jobs)):
            for record in records:
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
