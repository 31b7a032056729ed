"""A launcher's call written down: the allocations, torch ops and launches it made, on numbered tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes: what Triton asks about an address
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
UNPREDICTABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Unknown(Exception):
    """Something that cannot be replayed."""


class Launched(NamedTuple):
    kernel: JITFunction
    compiled: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


class Called(NamedTuple):
    op: torch._ops.OpOverload
    args: tuple
    options: dict[str, Any]
    result: Any


class Recorder(TorchDispatchMode):
    """Lists every torch op; `launch` adds the launches. All tensors stay alive, so that each is known by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Launched | Called] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.steps.append(Called(op, args, kwargs or {}, result))
        return result


def state() -> tuple:
    """What else decides how Triton compiles and launches, besides a kernel's arguments; () with hooks on launches."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return ()
    return runtime.debug, runtime.add_stages_inspection_hook, compilation.instrumentation_mode


class Step(NamedTuple):
    run: Callable[[list, list, int], bool]  # of all tensors, their addresses and the stream: whether all is well
    makes: tuple[int, ...]  # tensors
    needs: tuple[int, ...]
    always: bool  # or only if something needs what it makes
    calls: bool = False  # a torch op


class Plan:
    """Steps on tensors with numbers: first the inputs, then whatever was made."""

    def __init__(self, inputs: list[Tensor], record: list[Launched | Called], result: Any) -> None:
        self.driver, self.state = driver.active, state()
        self.device = self.driver.get_current_device()
        if not self.state or any(t.is_cuda and t.get_device() != self.device for t in inputs):
            raise Unknown
        numbers = Numbers(inputs)
        steps = [launched(numbers, s) if isinstance(s, Launched) else called(numbers, s) for s in record]
        if type(result) not in (Tensor, list, tuple):
            raise Unknown
        self.kind = type(result)
        results = [result] if self.kind is Tensor else result
        self.results = [None if tensor is None else numbers.own(tensor) for tensor in results]
        self.only = self.results[0] if self.kind is Tensor else None
        self.calls = False  # torch ops, beside allocations
        self.steps, needed = [], {number for number in self.results if number is not None}
        for step in reversed([step for step in steps if step is not None]):
            if step.always or needed.intersection(step.makes):
                self.steps.insert(0, step.run)
                self.calls |= step.calls
                needed.update(step.needs)
        self.made = [None] * (len(numbers.tensors) - len(inputs))

    def replay(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        """The call's result, or NotImplemented where something is not as it was."""
        active = self.driver
        if driver.active is not active or active.get_current_device() != self.device or state() != self.state:
            return NotImplemented
        if self.calls and torch.is_grad_enabled():  # they might be differentiated
            return NotImplemented
        stream = active.get_current_stream(self.device)
        tensors, addresses = tensors + self.made, addresses + self.made
        for run in self.steps:
            if not run(tensors, addresses, stream):
                return NotImplemented
        if self.kind is Tensor:
            return tensors[self.only]
        return self.kind([None if number is None else tensors[number] for number in self.results])


class Numbers:
    """The number of each tensor, and where its memory is: in which tensor's, how many bytes from its address."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.tensors: list[Tensor] = []
        self.places: list[tuple[int, int]] = []
        self.by_id: dict[int, int] = {}
        self.storages: set[int] = set()
        self.inputs = len(inputs)
        for tensor in inputs:
            self.add(tensor)

    def add(self, tensor: Tensor, base: Tensor | None = None) -> int:
        number = self.by_id[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        storage = tensor.untyped_storage()._cdata
        if base is None:
            if number >= self.inputs and storage in self.storages:
                raise Unknown  # a view that does not say so
            self.places.append((number, 0))
        else:
            root = self.tensors[self.places[self[base]][0]]
            if storage != root.untyped_storage()._cdata:
                raise Unknown
            self.places.append((self[root], start(tensor) - start(root)))
        self.storages.add(storage)
        return number

    def __getitem__(self, tensor: Tensor) -> int:
        return self.by_id[id(tensor)]

    def own(self, tensor: Tensor) -> int:
        """The number of a tensor in memory that the call itself allocated."""
        number = self[tensor]
        if self.places[number][0] < self.inputs:
            raise Unknown
        return number


def start(tensor: Tensor) -> int:
    return tensor.storage_offset() * tensor.itemsize


def called(numbers: Numbers, call: Called) -> Step | None:
    op, args, options, result = call
    if op is torch.ops.aten.detach.default:
        numbers.by_id[id(result)] = numbers[args[0]]
        return None
    if not any(isinstance(item, Tensor) for item in tree_leaves((args, options, result))):
        return None  # torch.promote_types, say
    made = [result] if isinstance(result, Tensor) else result
    if not isinstance(made, (list, tuple)) or not all(isinstance(tensor, Tensor) for tensor in made):
        raise Unknown
    if UNPREDICTABLE.intersection(op.tags) or any(isinstance(option, Tensor) for option in options.values()):
        raise Unknown
    if any(isinstance(item, Tensor) for arg in args if isinstance(arg, (list, tuple)) for item in arg):
        raise Unknown
    changes = op._schema.is_mutable
    if changes:
        if made[0] is not args[0] or len(made) > 1:
            raise Unknown
        if args[0].numel() == 0:
            return None
    needs = tuple(numbers[arg] for arg in args if isinstance(arg, Tensor))
    if changes:
        makes = (numbers[made[0]],)
    else:
        makes = tuple(numbers.add(tensor, args[0] if op.is_view else None) for tensor in made)
    if op.namespace == "aten" and op._opname in ALLOCATIONS:
        return Step(allocation(makes[0], result), makes, (), always=False)

    positions = [(at, numbers[arg]) for at, arg in enumerate(args) if isinstance(arg, Tensor)]
    args = [None if isinstance(arg, Tensor) else arg for arg in args]  # lest the plan keep them
    single, fresh = isinstance(result, Tensor), not (changes or op.is_view)

    def run(tensors: list, addresses: list, stream: int) -> bool:
        given = list(args)
        for position, number in positions:
            given[position] = tensors[number]
        result = op(*given, **options)
        for number, tensor in zip(makes, (result,) if single else result):
            tensors[number] = tensor
            if fresh:
                addresses[number] = tensor.data_ptr()
                if addresses[number] % ALIGNMENT:
                    return False
        return True

    return Step(run, makes, needs, always=changes, calls=True)


def allocation(number: int, like: Tensor) -> Callable[[list, list, int], bool]:
    size, stride, dtype, device = tuple(like.shape), like.stride(), like.dtype, like.device
    allocate = torch.empty_strided
    if like.storage_offset() or like.is_pinned():
        raise Unknown

    def run(tensors: list, addresses: list, stream: int) -> bool:
        tensor = tensors[number] = allocate(size, stride, dtype=dtype, device=device)
        address = addresses[number] = tensor.data_ptr()
        return address % ALIGNMENT == 0

    return run


def launched(numbers: Numbers, call: Launched) -> Step:
    kernel, compiled, grid, args, options = call
    if type(kernel) is not JITFunction or kernel.pre_run_hooks or "run" in vars(kernel):
        raise Unknown
    given = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
    if not all(plain(arg) for arg in given if not isinstance(arg, Tensor)):
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
        raise Unknown
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
