"""Launches that repeat: what a launcher does for tensors of known shapes is recorded once and then replayed.

A launcher works out its grid, tiles and strides in Python, and Triton looks at every argument of a kernel to find its
code: a hundred microseconds together, for the same answer at every step of a training loop. With `replayed`, the second
call with the same key (shapes, strides, dtypes, alignments, device, settings) is recorded as a Plan, and the later ones
allocate, take addresses and launch. No tensor's contents are kept or looked at. A number that is only a kernel's
run-time argument (a temperature that changes at every step) is a Parameter: not part of the key.

A call is replayed only if every argument is accounted for; otherwise the launcher runs as it is written. So it does in
the interpreter, under an emulator, with launch hooks (profilers), on ROCm, and with a Triton that this was not tried
with or that is built differently, which is logged once.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
import triton
from torch import Tensor
from triton import JITFunction

from fastkl.kernels._plan import ALIGNMENT, Plan
from fastkl.kernels._record import Launched, Parameter, Recorder, Unfamiliar, Unknown

KEYS = 512  # new ones after which a launcher forgets what it has not used since as many came before
RUN = getattr(JITFunction, "run", None)  # an emulator puts its own in its place
TRIED = ("3.4", "3.5", "3.6", "3.7", "3.8", "3.9")  # versions of Triton
SEEN, NEVER = object(), object()  # a key met once, worth recording when it comes again; one that cannot be replayed

_log = logging.getLogger("fastkl")


@functools.cache
def say_once(why: str) -> None:
    _log.warning("launches are not replayed, which costs host time: Triton %s %s", triton.__version__, why)


def replayable() -> bool:
    """Whether launches can be replayed with this Triton."""
    interpreted = getattr(getattr(getattr(triton, "knobs", None), "runtime", None), "interpret", False)
    if torch.version.hip or interpreted:
        return False
    if ".".join(triton.__version__.split(".")[:2]) not in TRIED:
        say_once("is a version that this was not tried with")
        return False
    return getattr(RUN, "__module__", None) == "triton.runtime.jit"


REPLAYABLE = replayable()


class _Local(threading.local):
    recorder: Recorder | None = None


_local = _Local()
TENSORS = frozenset((Tensor, torch.nn.Parameter))
SETTINGS = frozenset((int, float, bool, str, NoneType))


def launch(kernel, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the device of its tensors, which need not be the current one."""
    device = device_of(args)
    values = [arg.value if type(arg) is Parameter else arg for arg in args]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = kernel[grid](*values, **options)
    else:
        compiled = kernel[grid](*values, **options)
    if _local.recorder is not None:
        _local.recorder.steps.append(Launched(kernel, compiled, grid, args, options, device))


def device_of(args: tuple) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))


def replayed(function: Callable) -> Callable:
    """For a launcher: a function of tensors, lists, settings and Parameters that does on the host what their shapes,
    strides, dtypes and values (of the settings) decide, and nothing else. Its kernels go through `launch`."""
    plans: dict[tuple, Any] = {}
    older: dict[tuple, Any] = {}  # which come back into `plans` when they are used

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not REPLAYABLE or JITFunction.run is not RUN or _local.recorder is not None:
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
            elif kind is Parameter:
                tensors.append(None)
                addresses.append(item.value)
                key.append(Parameter)
            else:
                return function(*args)
        key = tuple(key)
        plan = plans.get(key)
        if plan is None:
            if len(plans) >= KEYS:
                older.clear()
                older.update(plans)
                plans.clear()
            plan = older.pop(key, None)
            plans[key] = plan or SEEN
        if type(plan) is Plan:
            result = plan.replay(tensors, addresses)
            return function(*args) if result is NotImplemented else result
        if plan is SEEN:
            result, plans[key] = record(function, args)
            return result
        return function(*args)

    call.plans, call.older = plans, older
    return call


def record(function: Callable, args: tuple) -> tuple[Any, Any]:
    """(function(*args), its Plan or NEVER)."""
    inputs: list[Tensor | Parameter] = []

    def alias(arg: Any) -> Any:
        """An object of its own for each argument: two that are one now need not be at the next call."""
        if isinstance(arg, (Tensor, Parameter)):
            inputs.append(Parameter(arg.value) if type(arg) is Parameter else arg.detach())
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
    except Unknown:
        return result, NEVER
    except (Unfamiliar, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        say_once(f"is built differently ({type(error).__name__}: {error})")
        return result, NEVER
