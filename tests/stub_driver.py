"""Triton's host path without a GPU and without compiling: a launch ends in the list LAUNCHES instead of in a driver.

Everything before that is Triton's own, its launcher's Python too; only its C functions and the compiler are replaced.
A plugin of pytest, for a process that runs with TRITON_INTERPRET=0; with the fixtures and helpers of replay_*.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
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


nvidia.PyKernelArg, nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = Kind, 0, 1, 2
triton.compiler.compile = Compiled
DRIVER = Driver()
driver.set_active(DRIVER)

from fastkl.kernels import _launch, _plan, kl_normal  # noqa: E402
from fastkl.ops import _register  # noqa: E402

# A launcher and its settings.
forward = kl_normal.fwd
SETTINGS = (-1, [], 1, "logvar", float("-inf"), float("inf"), False)


@pytest.fixture(autouse=True)
def kernels_for_cpu_tensors(monkeypatch):
    for op, launcher in _register.TRITON.items():
        monkeypatch.setitem(_register.CPU, op, launcher)
    LAUNCHES.clear()
    kl_normal.fwd.plans.clear()


@pytest.fixture
def kept(monkeypatch):
    """No memory is used twice, so that an address says which tensor it is."""
    tensors = []

    def keep(allocate):
        def allocate_and_keep(*args, **kwargs):
            tensors.append(allocate(*args, **kwargs))
            return tensors[-1]

        return allocate_and_keep

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, keep(getattr(owner, name)))


@pytest.fixture
def replays(monkeypatch):
    """The results of all replays."""
    results, replay = [], _plan.Plan.replay

    def noted(self, *args):
        results.append(replay(self, *args))
        return results[-1]

    monkeypatch.setattr(_plan.Plan, "replay", noted)
    return results


def labelled(launches, tensors):
    """The launches with addresses as (tensor, offset in its memory), or as the how manieth new one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    known, seen = [(storage.data_ptr(), storage.nbytes(), at) for at, storage in enumerate(storages)], {}

    def label(value):
        if not isinstance(value, int) or value < 1 << 32:
            return value
        for start, size, at in known:
            if start <= value < start + size:
                return at, value - start
        return "new", seen.setdefault(value, len(seen)), value % 16

    return [(at.code, at.grid, at.stream, [label(value) for value in at.parameters]) for at in launches]


def pair(n=6, d=16, dtype=torch.float32, offset=0):
    """Two tensors whose first address lies `offset` bytes behind a multiple of 16."""
    memory = torch.zeros(2, n * d + 16, dtype=dtype)
    first = offset // memory.itemsize
    return [row[first : first + n * d].view(n, d) for row in memory]


def launched(function, tensors):
    LAUNCHES.clear()
    result = function(tensors, *SETTINGS)
    return labelled(LAUNCHES, [*tensors, result])


def ready():
    for _ in range(3):
        forward(pair(), *SETTINGS)
    LAUNCHES.clear()


def replayed_and(after):
    """A launcher that does `after` to what forward makes."""
    return _launch.replayed(lambda tensors: after(tensors, forward.__wrapped__(tensors, *SETTINGS)))
