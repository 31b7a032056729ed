"""Launches that repeat: what a launcher does for tensors of known shapes is recorded once and then replayed.

A launcher works out its grid, tiles and strides in Python, and Triton looks at every argument of a kernel to find its
code: a hundred microseconds together, for the same answer at every step of a training loop. With `replayed`, the second
call with the same key (shapes, strides, dtypes, alignments, device, settings) is recorded as a Plan, and the later ones
allocate, take addresses and launch. No tensor's contents are kept or looked at.

What is not understood to the last argument is not replayed: the launcher runs as it is written. So it does in the
interpreter, under an emulator, with launch hooks (profilers), on ROCm, and with a Triton whose inside looks different.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastkl.kernels._plan import ALIGNMENT, Plan
from fastkl.kernels._record import Launched, Recorder, Unknown

KEYS = 512  # that a launcher remembers; beyond them it starts anew
RUN = JITFunction.run  # an emulator puts its own in its place
KNOWN = (
    RUN.__module__ == "triton.runtime.jit"
    and hasattr(triton, "knobs")
    and not triton.knobs.runtime.interpret
    and not torch.version.hip
)
SEEN, NEVER = object(), object()  # a key met once, worth recording when it comes again; one that cannot be replayed


class _Local(threading.local):
    recorder: Recorder | None = None


_local = _Local()
TENSORS = frozenset((Tensor, torch.nn.Parameter))
SETTINGS = frozenset((int, float, bool, str, NoneType))


def launch(kernel, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the device of its tensors, which need not be the current one."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[grid](*args, **options)
    else:
        compiled = kernel[grid](*args, **options)
    if _local.recorder is not None:
        _local.recorder.steps.append(Launched(kernel, compiled, grid, args, options))


def replayed(function: Callable) -> Callable:
    """For a launcher: a function of tensors, lists and settings that does on the host what their shapes, strides and
    dtypes decide, and nothing else. Its kernels go through `launch`."""
    plans: dict[tuple, Any] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not KNOWN or JITFunction.run is not RUN or _local.recorder is not None:
            return function(*args)
        key, items = [], []
        for arg in args:
            if type(arg) is list:
                key.append(len(arg))
                items += arg
            else:
                items.append(arg)
        tensors, addresses = [], []
        for item in items:
            kind = type(item)
            if kind in SETTINGS:
                key.append(item)
            elif kind in TENSORS:
                address = item.data_ptr()
                tensors.append(item)
                addresses.append(address)
                key += (item.shape, item.stride(), item.dtype, address % ALIGNMENT, item.get_device())
            else:
                return function(*args)
        key = tuple(key)
        plan = plans.get(key)
        if type(plan) is Plan:
            result = plan.replay(tensors, addresses)
            return function(*args) if result is NotImplemented else result
        if plan is SEEN:
            result, plans[key] = record(function, args)
            return result
        if plan is None:
            if len(plans) >= KEYS:
                plans.clear()
            plans[key] = SEEN
        return function(*args)

    call.plans = plans
    return call


def record(function: Callable, args: tuple) -> tuple[Any, Any]:
    """(function(*args), its Plan or NEVER)."""
    inputs: list[Tensor] = []

    def alias(arg: Any) -> Any:
        """A tensor object of its own for each argument: two that are one now need not be at the next call."""
        if isinstance(arg, Tensor):
            inputs.append(arg.detach())
            return inputs[-1]
        return [alias(item) for item in arg] if type(arg) is list else arg

    aliases = [alias(arg) for arg in args]
    recorder = _local.recorder = Recorder()
    try:
        with recorder:
            result = function(*aliases)
    finally:
        _local.recorder = None
    try:
        return result, Plan(inputs, recorder.steps, result)
    except (Unknown, AttributeError, KeyError, TypeError):  # the latter of a Triton that is built differently
        return result, NEVER
