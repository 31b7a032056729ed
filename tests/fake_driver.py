"""Triton's launches without a GPU: its own driver, launcher, compiler and ptxas, with a libcuda that launches nothing.

A pytest plugin (`-p fake_driver`, with tests/ on PYTHONPATH). It needs a separate process, because Triton decides once
per process whether to interpret. Each launch is appended to LAUNCHES. If EXECUTE is set, it is called per launch as
EXECUTE(compiled kernel, grid, block, shared, parameters), and may run compiled.asm["ptx"] on the tensors' memory.
Tensors are on the CPU, so the ops must use the kernels for CPU tensors (`helpers.implementation("triton")`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("fake_cuda.c")
INVALID_VALUE = 1
LAUNCHES: list[Launch] = []
EXECUTE: Callable[..., None] | None = None
DRIVER: Any = None  # set by install()
_KERNELS: dict[int, Kernel] = {}  # by the function that libcuda launches
_C = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "u16": ctypes.c_uint16, "u8": ctypes.c_uint8,
      "b64": ctypes.c_uint64, "b32": ctypes.c_uint32, "b16": ctypes.c_uint16, "b8": ctypes.c_uint8,
      "s64": ctypes.c_int64, "s32": ctypes.c_int32, "f64": ctypes.c_double, "f32": ctypes.c_float}  # fmt: skip


class Launch(NamedTuple):
    name: str  # of the kernel
    code: str  # a hash of its PTX
    device: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    parameters: list  # as the PTX declares them: a number, or the address of a pointer


class Kernel(NamedTuple):
    compiled: Any  # Triton's CompiledKernel
    code: str
    kinds: list[type]


def parameter_kinds(ptx: str) -> list[type]:
    head = ptx[ptx.index(".entry") :]
    return [_C[kind] for kind in re.findall(r"\.param\s+\.(?:align\s+\d+\s+\.)?(\w+)", head[: head.index("{")])]


@ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, *[ctypes.POINTER(ctypes.c_uint)] * 2, ctypes.c_uint, ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
def _on_launch(function, device, grid, block, shared, stream, addresses):
    try:
        compiled, code, kinds = _KERNELS[function]
        grid, block = tuple(grid[:3]), tuple(block[:3])
        values = [ctypes.cast(addresses[at], ctypes.POINTER(kind))[0] for at, kind in enumerate(kinds)]
        LAUNCHES.append(Launch(compiled.name, code, device, grid, block, shared, stream, values))
        if EXECUTE is not None:
            EXECUTE(compiled, grid, block, shared, values)
    except BaseException:  # exceptions cannot pass through C
        traceback.print_exc()
        return INVALID_VALUE
    return 0


def build(folder: Path, compiler: tuple[str, ...]) -> ctypes.CDLL:
    library = folder / "libcuda.so.1"
    name = ["-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*compiler, "-O1", "-w", "-shared", "-fPIC", str(SOURCE), *name], check=True)
    (folder / "libcuda.so").symlink_to(library)  # by this name older versions link it
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def install(compiler: tuple[str, ...]) -> None:
    """Make the fake driver Triton's active one. Call it before anything loads libcuda."""
    global DRIVER
    folder = tempfile.TemporaryDirectory(prefix="fastkl-cuda-")
    library = build(Path(folder.name), compiler)
    library.fake_on_launch(_on_launch)
    os.environ["TRITON_LIBCUDA_PATH"] = folder.name

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    load = CompiledKernel._init_handles

    def load_and_note(self):
        load(self)
        if self.function not in _KERNELS:
            ptx = self.asm["ptx"]
            code = hashlib.sha256(ptx.encode()).hexdigest()[:12]
            _KERNELS[self.function] = Kernel(self, code, parameter_kinds(ptx))

    CompiledKernel._init_handles = load_and_note

    class Driver(CudaDriver):
        stream = 0

        def __init__(self):
            super().__init__()
            self.folder = folder  # keep it alive: launchers are linked with the library in it
            self.get_current_device, self.set_current_device = library.fake_device, library.fake_set_device
            self.get_current_stream = lambda device: self.stream
            self.get_device_capability = lambda device=None: (9, 0)

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        @contextlib.contextmanager
        def on(self, device):
            before = self.get_current_device()
            self.set_current_device(device)
            try:
                yield
            finally:
                self.set_current_device(before)

    DRIVER = Driver()
    driver.set_active(DRIVER)


def pytest_load_initial_conftests(early_config) -> None:
    from fastkl.native import _build

    install(_build._compiler())
