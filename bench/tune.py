"""Choose the tiles of the elementwise kernels: kernels/_tuned.py.

    python -m bench.tune                              # every op, float32 and bfloat16
    python -m bench.tune --op rsample_kl --dtype bfloat16
    python -m bench.tune --write                      # puts the best into kernels/_tuned.py

On a GPU each candidate is timed, forward and backward. Without one candidates are compiled for --target and ranked by
an ESTIMATE, for an H100, per element:

    time = max(bytes / 3.35e12 * max(1, 32 KiB / in flight), instructions / 2.96e13) seconds

bytes: what the op must move. instructions: of the compiled code, each counted once, over a tile's elements for each
thread. in flight: the most bytes that a thread has asked for before it needs one of them, times the threads whose
registers fit a multiprocessor. What spills registers comes last.
"""

from __future__ import annotations

import argparse
import ast
import collections
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels" / "_tuned.py"
BANDWIDTH, ISSUE = 3.35e12, 2.96e13  # bytes, and instructions of a thread, in a second: H100 SXM
IN_FLIGHT = 32 * 1024  # bytes for each multiprocessor that hide the latency of its memory
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # of a multiprocessor; a register file hands out 8 for each thread
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPE = (4096, 512)
NO_BOUNDS = ("logvar", float("-inf"), float("inf"), False)


class Code(NamedTuple):
    """A compiled kernel with one tile a program."""

    instructions: float  # for each element
    registers: int
    in_flight: int  # bytes for each multiprocessor
    spills: int
    wide: float = 0.0  # bytes for each element that move by 16 or more at once


def calls(op: str, dtype: torch.dtype, device: str) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Direction -> (tensors moved, a call of the launcher), of every elementwise kernel."""
    import importlib

    kernels = importlib.import_module(f"fastkl.kernels.{op}")
    a, b, c = (torch.zeros(SHAPE, dtype=dtype, device=device) for _ in range(3))
    rows, columns = (torch.zeros(size, device=device) for size in SHAPE)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    settings = {
        "bernoulli_log_prob": (2, (a, b, 1), 3, (rows, a, b, 1, [True, False])),
        "kl_normal": (2, ([a, b], -1, [], 1, *NO_BOUNDS), 4, (rows, [a, b], -1, [], 1, *NO_BOUNDS, False)),
        "kl_normal_per_dim": (2, (a, b, [], 1, *NO_BOUNDS), 4, (columns, a, b, [], 1, *NO_BOUNDS, False)),
        "normal_log_prob": (3, (a, b, c, 1), 6, (rows, a, b, c, 1, [True] * 3)),
        "rsample_kl": (
            3, ([a, b], seed, None, None, -1, [], 1, *NO_BOUNDS),
            5, (c, rows, [a, b], seed, None, None, -1, [], 1, *NO_BOUNDS, False),
        ),
        # Not in the table: tiles of their own, or those of the two before.
        "gumbel_softmax": (2, (a, None, seed, 0.7, False, 1), 3, (b, None, a, None, seed, 0.7, False, 1, False)),
        "rsample_normal": (
            3, ([a, b], seed, None, None, -1, *NO_BOUNDS), 4, (c, [a, b], seed, None, None, -1, *NO_BOUNDS),
        ),
        "wasserstein2_normal": (2, (a, b, [], 1, *NO_BOUNDS), 4, (rows, a, b, [], 1, *NO_BOUNDS, False)),
    }  # fmt: skip
    forward, fwd, backward, bwd = settings[op]
    return {"fwd": (forward, lambda: kernels.fwd(*fwd)), "bwd": (backward, lambda: kernels.bwd(*bwd))}


def candidates(itemsize: int) -> list[tuple[int, int]]:
    """(elements of a tile, warps): one to four 16-byte accesses of each tensor for a thread."""
    return [(n * 16 // itemsize * 32 * warps, warps) for warps in (2, 4, 8) for n in (1, 2, 4)]


# ---------------------------------------------------------------------------------------------- without a GPU


def disassembled(cubin: bytes) -> tuple[str, str]:
    """(SASS, resources)."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [[tools / "nvdisasm", "-c", file.name], [tools / "cuobjdump", "-res-usage", file.name]]
        return tuple(subprocess.run(c, check=True, capture_output=True, text=True).stdout for c in command)


def instructions(sass: str) -> list[tuple[str, str]]:
    """(operation, operands), without the padding at the end."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    while found and found[-1][0] in ("NOP", "BRA"):
        found.pop()
    return found


def asked_for(code: list[tuple[str, str]]) -> int:
    """The most bytes of global loads that one thread waits for at a time, read from top to bottom; loads return in
    order."""
    most, waiting = 0, []
    for operation, operands in code:
        used = {int(n) + i for n, pair in re.findall(r"\bR(\d+)(\.64)?", operands) for i in range(1 + bool(pair))}
        for index in reversed(range(len(waiting))):
            if waiting[index][1] & used:
                waiting = waiting[index + 1 :]
                break
        if operation.split(".")[0] == "LDG":
            size = max([4, *(int(n) // 8 for n in re.findall(r"\.(64|128|256)\b", operation))])
            first = int(re.search(r"\bR(\d+)", operands)[1])
            waiting.append((size, set(range(first, first + size // 4))))
        most = max(most, sum(size for size, _ in waiting))
    return most


def moved_wide(code: list[tuple[str, str]]) -> int:
    """Bytes that one thread loads from and stores to global memory in accesses of 16 or more."""
    found = [re.search(r"^(?:LDG|STG)\b.*\.(128|256)\b", operation) for operation, _ in code]
    return sum(int(match[1]) // 8 for match in found if match)


def resident_threads(registers: int, threads: int) -> int:
    programs = min(REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads, PROGRAMS)
    return programs * threads


def code(cubin: bytes, elements: int, warps: int) -> Code:
    sass, usage = disassembled(cubin)
    found = instructions(sass)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    in_flight = asked_for(found) * resident_threads(registers, 32 * warps)
    spills = int(re.search(r"STACK:(\d+)", usage)[1])
    each = 32 * warps / elements  # threads for each element
    return Code(len(found) * each, registers, in_flight, spills, moved_wide(found) * each)


def compiled(call: Callable[[], Any], target: str) -> Code:
    """The kernel that `call` launches, compiled for `target` in place of run."""
    sys.path.append(str(ROOT / "tests"))
    import aot

    found = []

    def receive(kernel, function, options):
        found.append(code(kernel.asm["cubin"], options["ROWS"] * options["COLUMNS"], options["num_warps"]))

    with aot.compiling(target, receive):
        call()
    return found[0]


def estimate(tensors: int, itemsize: int, found: Code) -> float:
    """Seconds for each element, on an H100."""
    memory = tensors * itemsize / BANDWIDTH * max(1.0, IN_FLIGHT / max(1, found.in_flight))
    return max(memory, found.instructions / ISSUE)


# ----------------------------------------------------------------------------------------------------- on a GPU


def timed(call: Callable[[], Any], rounds: int = 50) -> float:
    """Median seconds for each element, by CUDA events; the tensors are larger than what a cache keeps."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times) / (SHAPE[0] * SHAPE[1])


# ---------------------------------------------------------------------------------------------------- the table


def rank(op: str, dtype: torch.dtype, tiles: list[tuple[int, int]], target: str, device: str) -> list[tuple]:
    """(spills, seconds for each element both ways, tile, {direction: Code}), the best first."""
    from fastkl.kernels import _tuned

    table, results = _tuned.TILES[op], []
    before = table[dtype.itemsize]
    for tile in tiles:
        table[dtype.itemsize] = tile
        seconds, codes = 0.0, {}
        for direction, (tensors, call) in calls(op, dtype, device).items():
            forget()
            if device == "cuda":
                seconds += timed(call)
            else:
                codes[direction] = compiled(call, target)
                seconds += estimate(tensors, dtype.itemsize, codes[direction])
        results.append((sum(c.spills for c in codes.values()), seconds, tile, codes))
    table[dtype.itemsize] = before
    forget()
    # Of equals the one that is there already.
    return sorted(results, key=lambda result: (result[0] > 0, round(result[1] * 1e15), result[2] != before))


def forget() -> None:
    """What launchers have recorded of launches with another tile."""
    for module in [module for name, module in sys.modules.items() if name.startswith("fastkl.kernels.")]:
        for launcher in vars(module).values():
            if hasattr(launcher, "plans"):
                launcher.plans.clear()


def written(source: str, best: dict[str, dict[int, tuple[int, int]]]) -> str:
    """The source of kernels/_tuned.py with other tiles."""
    node = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign))
    table = ast.literal_eval(node.value)
    for op, tiles in best.items():
        table[op].update(tiles)
    lines = source.splitlines(keepends=True)
    entries = "".join(f'    "{op}": {dict(sorted(tiles.items()))},\n' for op, tiles in sorted(table.items()))
    return "".join(lines[: node.lineno - 1]) + f"TILES = {{\n{entries}}}\n" + "".join(lines[node.end_lineno :])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ops = list(ast.literal_eval(TABLE.read_text().split("TILES =")[1]))
    parser.add_argument("--op", choices=ops, nargs="+", default=ops)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--target", default="sm_90", help="what to compile for without a GPU: sm_80, sm_90, sm_100, ..")
    parser.add_argument("--tile", nargs="+", metavar="ELEMENTSxWARPS", help="these candidates only, as 2048x4")
    parser.add_argument("--write", action="store_true", help="put the best into kernels/_tuned.py")
    options = parser.parse_args(arguments)
    tiles = [tuple(map(int, tile.split("x"))) for tile in options.tile or []]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Timed on {torch.cuda.get_device_name()}" if device == "cuda" else f"ESTIMATE, not timed ({options.target})")
    if device == "cpu":
        print("time = max(bytes / 3.35e12 * max(1, 32 KiB / in flight), instructions / 2.96e13) seconds an element")
    best: dict[str, dict[int, tuple[int, int]]] = collections.defaultdict(dict)
    for op in options.op:
        for name in options.dtype:
            dtype = DTYPES[name]
            ranked = rank(op, dtype, tiles or candidates(dtype.itemsize), options.target, device)
            best[op][dtype.itemsize] = ranked[0][2]
            print(f"\n{op}, {name}: tile x warps, picoseconds an element both ways")
            for spills, seconds, (elements, warps), codes in ranked:
                about = "; ".join(
                    f"{direction} {c.instructions:.1f} instructions, {c.registers} registers, "
                    f"{c.in_flight / 1024:.0f} KiB in flight" for direction, c in codes.items()
                )  # fmt: skip
                spilled = f", {spills} bytes spilled" if spills else ""
                print(f"{elements:>6} x {warps}  {seconds * 1e12:6.2f}  {about}{spilled}", flush=True)
    if options.write:
        TABLE.write_text(written(TABLE.read_text(), best))
        print(f"\nwritten: {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: candidates are compiled
    main()
