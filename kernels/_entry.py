"""A launch written down: the code that Triton chose, and its arguments but for the addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import triton
from torch import Tensor
from triton import JITFunction
from triton.runtime import driver

from fastkl.kernels._record import Launched, Numbers, Parameter, Step, Unfamiliar, Unknown


def launched(numbers: Numbers, call: Launched) -> Step:
    kernel, compiled, grid, args, options, _device = call
    if type(kernel) is not JITFunction or kernel.pre_run_hooks or "run" in vars(kernel):
        raise Unknown
    given = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
    if not all(plain(arg) for arg in given if not isinstance(arg, (Tensor, Parameter))):
        raise Unknown
    start_kernel, after, given = entry(compiled, given)
    pointers = []
    for position, arg in enumerate(given):
        if isinstance(arg, Tensor):
            number, offset = numbers.places[numbers[arg]]
            if arg.numel() == 0 or arg.data_ptr() != numbers.tensors[number].data_ptr() + offset:
                raise Unknown
            pointers.append((position, number, offset))
            given[position] = None
        elif type(arg) is Parameter:
            pointers.append((position, numbers[arg], 0))
            given[position] = None
    x, y, z = *grid, *[1] * (3 - len(grid))

    def run(tensors: list, addresses: list, stream: int) -> bool:
        arguments = given.copy()
        for position, number, offset in pointers:
            arguments[position] = addresses[number] + offset
        start_kernel(x, y, z, stream, *after, arguments)
        return True

    return Step(run, (), tuple(number for _, number, _ in pointers), always=True)


def entry(compiled: Any, given: list) -> tuple[Callable, tuple, list]:
    """(function, its arguments between the stream and the kernel's arguments, the kernel's arguments) of a launch.

    Triton 3.9's own C function where it has nothing to do but to launch, given no more than the kernel's parameters;
    else the launcher of the compiled kernel, which is the same in all versions since 3.4.
    """
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if type(launcher).__name__ != "CudaLauncher":
        raise Unfamiliar(f"launches through {type(launcher).__name__}")
    scratch = [name for name in ("global_scratch_size", "profile_scratch_size") if getattr(launcher, name, 1) > 0]
    if not triton.__version__.startswith("3.9.") or scratch or launcher.gsan_enabled:
        return lambda *args: launcher(*args[:-1], *args[-1]), (function, metadata, None, None, None), given
    from triton.backends.nvidia.driver import ARG_KERNEL, PyKernelArg

    given = list(parameters(compiled.src.signature.values(), given))
    if launcher.launch is not driver.active.utils.launch or len(given) != len(launcher.kernel_signature):
        raise Unknown  # tensor descriptors
    kinds = [PyKernelArg(nested_tuple=None, type=ARG_KERNEL)] * len(given)
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    after = (function, cooperative, dependent, metadata, None, None, None, None, None, kinds, launcher.kernel_signature)
    return launcher.launch, after, given


def parameters(signature: Iterable, given: Iterable) -> Iterator[Any]:
    """What the compiled code takes: no constants, tuples flattened."""
    for kind, arg in zip(signature, given, strict=True):
        if isinstance(kind, tuple):
            yield from parameters(kind, arg)
        elif kind != "constexpr":
            yield arg


def plain(arg: Any) -> bool:
    if isinstance(arg, tuple):
        return all(plain(item) for item in arg)
    return arg is None or isinstance(arg, (bool, int, float, str, triton.language.dtype))
