"""A launcher's call, ready to be repeated: its allocations, torch ops and launches, for other tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime import driver

from fastkl.kernels._entry import launched
from fastkl.kernels._record import Called, Launched, Numbers, Parameter, Step, Unknown

ALIGNMENT = 16  # bytes: what Triton asks about an address
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
UNPREDICTABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def state() -> tuple:
    """What else decides how Triton compiles and launches, besides a kernel's arguments; () with hooks on launches."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return ()
    stages, mode = "add_stages_inspection_hook", "instrumentation_mode"  # since Triton 3.6
    return runtime.debug, getattr(runtime, stages, None), getattr(compilation, mode, None)


class Plan:
    """Steps on tensors with numbers: first the inputs, then whatever was made."""

    def __init__(self, inputs: list[Tensor | Parameter], record: list[Launched | Called], result: Any) -> None:
        self.driver, self.state = driver.active, state()
        self.device = self.driver.get_current_device()
        devices = {step.device for step in record if isinstance(step, Launched)}
        if not self.state or any(device.type == "cuda" and device.index != self.device for device in devices):
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
