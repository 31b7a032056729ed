"""What a compiled elementwise kernel costs, read from its code: for tuning without a GPU.

An ESTIMATE, for an H100, for each element:

    time = max(bytes / 3.35e12 * max(1, 32 KiB / in flight), instructions / 2.96e13) seconds

bytes: what the op must move. instructions: of the compiled code, each counted once, over a tile's elements for each
thread. in flight: the most bytes that a thread has asked for before it needs one of them, times the threads whose
registers fit a multiprocessor.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BANDWIDTH, ISSUE = 3.35e12, 2.96e13  # bytes, and instructions of a thread, in a second: H100 SXM
IN_FLIGHT = 32 * 1024  # bytes for each multiprocessor that hide the latency of its memory
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # of a multiprocessor; a register file hands out 8 for each thread


class Code(NamedTuple):
    """A compiled kernel with one tile a program."""

    instructions: float  # for each element
    registers: int
    in_flight: int  # bytes for each multiprocessor
    spills: int
    wide: float = 0.0  # bytes for each element that move by 16 or more at once


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
