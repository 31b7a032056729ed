"""An estimate of the time of a compiled elementwise kernel from its code, for tuning without a GPU.

An ESTIMATE, for an H100, for each element:

    time = max(bytes / 3.35e12 * max(1, 32 KiB / in flight), instructions / 2.96e13) seconds

bytes: the traffic of the op. instructions: those of the compiled code, each counted once, divided by the elements of a
thread. in flight: the most bytes that a thread has requested before it uses one of them, times the threads whose
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
BANDWIDTH, ISSUE = 3.35e12, 2.96e13  # bytes, and thread instructions, per second: H100 SXM
IN_FLIGHT = 32 * 1024  # bytes in flight per multiprocessor that hide the memory's latency
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # limits of a multiprocessor; registers are allocated by 8 per thread


class Code(NamedTuple):
    """A compiled kernel with one tile a program."""

    instructions: float  # per element
    registers: int
    in_flight: int  # bytes per multiprocessor
    spills: int
    wide: float = 0.0  # bytes per element in accesses of 16 bytes or more


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
    """(operation, operands) of each instruction, without the padding at the end."""
    listed = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    while listed and listed[-1][0] in ("NOP", "BRA"):
        listed.pop()
    return listed


def bytes_in_flight(code: list[tuple[str, str]]) -> int:
    """The most bytes of global loads that one thread waits for at a time, in the order of the code; loads return in
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
    """Bytes of one thread's global loads and stores in accesses of 16 bytes or more."""
    matches = [re.search(r"^(?:LDG|STG)\b.*\.(128|256)\b", operation) for operation, _ in code]
    return sum(int(match[1]) // 8 for match in matches if match)


def resident_threads(registers: int, threads: int) -> int:
    programs = min(REGISTERS // (-(-registers // 8) * 8 * threads), THREADS // threads, PROGRAMS)
    return programs * threads


def code(cubin: bytes, elements: int, warps: int) -> Code:
    sass, usage = disassembled(cubin)
    listed = instructions(sass)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    in_flight = bytes_in_flight(listed) * resident_threads(registers, 32 * warps)
    spills = int(re.search(r"STACK:(\d+)", usage)[1])
    each = 32 * warps / elements  # threads per element
    return Code(len(listed) * each, registers, in_flight, spills, moved_wide(listed) * each)


def compiled(call: Callable[[], Any], target: str) -> Code:
    """The kernel that `call` launches, compiled for `target` instead of run."""
    sys.path.append(str(ROOT / "tests"))
    import aot

    kernels = []

    def receive(kernel, function, options):
        kernels.append(code(kernel.asm["cubin"], options["ROWS"] * options["COLUMNS"], options["num_warps"]))

    with aot.compiling(target, receive):
        call()
    return kernels[0]


def estimate(tensors: int, itemsize: int, kernel: Code) -> float:
    """Seconds per element, on an H100."""
    memory = tensors * itemsize / BANDWIDTH * max(1.0, IN_FLIGHT / max(1, kernel.in_flight))
    return max(memory, kernel.instructions / ISSUE)
