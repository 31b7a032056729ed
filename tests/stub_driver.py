"""Triton's host path without a GPU and without compiling: a launch ends in the list LAUNCHES instead of in a driver.

Everything before that is Triton's own, its launcher's Python too; only its C functions and the compiler are replaced.
For a process that runs with TRITON_INTERPRET=0.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

LAUNCHES: list[Launch] = []


class Launch(NamedTuple):
    code: str  # what was compiled: the kernel, its signature, constants, attributes and options
    grid: tuple[int, int, int]
    stream: int
    parameters: list  # of the compiled code; an address for a pointer


class Compiled:
    """Stands in for Triton's CompiledKernel."""

    def __init__(self, src, target, options):
        pairs = [f"{name}={value}" for name, value in sorted(options.items())]
        self.function = f"{src.fn.__name__} {src.signature} {src.constants} {src.attrs} {pairs}"
        self.src, self.packed_metadata, sizes = src, (options["num_warps"], 1, 0), ("scratch_size", "scratch_align")
        metadata = {f"{what}_{size}": 0 for what in ("global", "profile") for size in sizes}
        self.metadata = SimpleNamespace(launch_cooperative_grid=False, launch_pdl=False, **metadata)
        self.run = nvidia.CudaLauncher(src, self.metadata)

    def launch_metadata(self, grid, stream, *args):
        return None


class Kind(NamedTuple):
    nested_tuple: list | None
    type: int


def flatten(kinds, arguments):
    """As launchKernel in Triton's driver.c reads its arguments."""
    for kind, argument in zip(kinds, arguments, strict=True):
        if kind.type == nvidia.ARG_TUPLE:
            yield from flatten(kind.nested_tuple, argument)
        elif kind.type == nvidia.ARG_KERNEL:
            yield argument.data_ptr() if hasattr(argument, "data_ptr") else argument


def launch(x, y, z, stream, function, cooperative, dependent, metadata, about, enter, leave, *scratch_and_kinds):
    *scratch, kinds, signature, arguments = scratch_and_kinds
    assert (cooperative, dependent, scratch, about) == (False, False, [None, None], None)
    parameters = list(flatten(kinds, arguments))
    assert len(parameters) == len(signature)
    for hook in (enter, leave):
        if hook is not None:
            hook(about)
    LAUNCHES.append(Launch(function, (x, y, z), stream, parameters))


class Driver(nvidia.CudaDriver):
    def __init__(self):
        self.utils = SimpleNamespace(launch=launch, build_signature_metadata=tuple)
        self.launcher_cls = nvidia.CudaLauncher
        self.device, self.stream = 0, 0
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def install() -> Driver:
    nvidia.PyKernelArg, nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = Kind, 0, 1, 2
    triton.compiler.compile = Compiled
    driver.set_active(Driver())
    return driver.active
