"""Compile kernels ahead of time, for every target, on a machine without a GPU.

    TRITON_INTERPRET=0 python tests/aot.py test_kl_normal test_rsample_kl

runs those modules' `aot_calls()` (name -> a call of a launcher), compiles each launch as Triton would specialise it
there instead of running it, and prints one JSON line per kernel and target: spills, shared memory, the width of global
loads and stores. `test_compiled.py` asserts on them. To save time, only calls named "core ..." are compiled for every
target, the others for one each, in turn; FASTKL_AOT=all compiles everything everywhere.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from helpers import TARGETS

OTHERS = [name for name in TARGETS if name != "sm_90"]


def compile_for(fn, args: tuple, kwargs: dict, target):
    """The kernel that `fn[grid](*args, **kwargs)` would build on `target`."""
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    if target.backend == "hip":  # where launchers leave it out
        kwargs = {name: value for name, value in kwargs.items() if name != "maxnreg"}
    bound, specialization, options = create_function_from_signature(fn.signature, fn.params, backend)(
        *args, debug=False, **kwargs
    )
    options, signature, constants, attributes = fn._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=options.__dict__)


def describe(kernel, target) -> dict:
    """Spills, bytes of shared memory, and how many global loads and stores move 16 bytes or more for each thread."""
    if target.backend == "hip":
        code = kernel.asm["amdgcn"]
        # Scalar registers spill into lanes of vector registers, not to memory.
        spills = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", code))
        wide = [len(re.findall(rf"\b(?:global|buffer)_{what}_dwordx4", code)) for what in ("load", "store")]
    else:
        # What spills lies in the frame on the stack, and the kernels have nothing else there.
        spills = sum(int(n) for n in re.findall(r"STACK:(\d+)", resources(kernel.asm["cubin"])))
        # ptxas keeps these widths, and disassembling what it makes would take as long as compiling.
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


def compile_module(module: str, target_name: str) -> list[dict]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target, records, call = GPUTarget(*TARGETS[target_name]), [], ""
    every = os.environ.get("FASTKL_AOT") == "all"

    def run(self, *args, grid, warmup=False, **kwargs):
        about = {"module": module, "call": call, "kernel": self.__name__, "target": target_name}
        records.append({**about, **describe(compile_for(self, args, kwargs, target), target)})

    JITFunction.run = run
    warnings.simplefilter("ignore")
    for index, (name, launch) in enumerate(importlib.import_module(module).aot_calls().items()):
        if every or name.startswith("core") or target_name == OTHERS[index % len(OTHERS)]:
            call = name
            launch()
    return records


def main(modules: list[str]) -> None:
    jobs = itertools.product(modules, TARGETS)
    with concurrent.futures.ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for records in pool.map(compile_module, *zip(*jobs)):
            for record in records:
                print(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1:])
