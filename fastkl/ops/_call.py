"""The path of a call: a check that suffices for the common call, the autograd.Function, and the implementation.

A public function calls `apply` with its Function, whose forward and backward call the ops that `_register.register`
returned. In eager mode each of them goes straight to the implementation for its tensors' device.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from fastkl.ops import _sharding, _torch
from fastkl.ops._arguments import DTYPES
from fastkl.ops._forward_mode import with_tangents
from fastkl.ops._fused import is_fused
from fastkl.reference import SCALES

# Name of each op -> its implementation. `CPU` is the table in use for CPU tensors. Tests swap in `TRITON` to run the
# kernels in the interpreter.
CLOSED_FORM: dict[str, Callable[..., Any]] = {}
NATIVE: dict[str, Callable[..., Any]] = {}
TRITON: dict[str, Callable[..., Any]] = {}
CPU: dict[str, Callable[..., Any]] = {}

_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN = _TENSORS | {int, float, bool, str, NoneType}


def run(table: dict[str, Callable[..., Any]], name: str, *args: Any) -> Any:
    """Run the op by a table's implementation, or by the closed form if that returns NotImplemented."""
    result = table[name](*args)
    return CLOSED_FORM[name](*args) if result is NotImplemented else result


def direct(name: str, dispatched: Callable[..., Any], terms: Callable[..., float] | None = None) -> Callable[..., Any]:
    """The op, called without torch's dispatcher if nothing intercepts the call and the memory of every tensor holds its
    values: it is strided, no subclass, not lazily negated, and no zero tensor without memory. This saves a third of the
    host time of a small loss."""

    def op(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            if terms is not None:
                device = next(arg.device for arg in args if isinstance(arg, Tensor))
                if is_fused(device, terms(*args)):
                    return CLOSED_FORM[name](*args)
            return dispatched(*args)
        if _torch.modes_active() or _torch.transforms_active() or _torch.profiling() or _torch.tracing():
            return dispatched(*args)
        each = args
        if not _PLAIN.issuperset(map(type, each)):
            each = tuple(item for arg in args for item in (arg if type(arg) is list else (arg,)))
            if not _PLAIN.issuperset(map(type, each)):
                return dispatched(*args)
        table = None
        for arg in each:
            if type(arg) in _TENSORS:
                if arg.layout is not torch.strided or arg.is_neg() or _torch.is_zero(arg):
                    return dispatched(*args)
                table = CPU if arg.is_cpu else TRITON if arg.is_cuda else None
        if table is None:
            return dispatched(*args)
        result = table[name](*args)  # `run`, inlined
        return CLOSED_FORM[name](*args) if result is NotImplemented else result

    return op


def has_own_memory(*tensors: Tensor) -> bool:
    """Whether code in C may read the tensors' values from their memory: the conditions of `direct`, on CPU tensors."""
    if torch.compiler.is_compiling() or _torch.modes_active() or _torch.transforms_active() or _torch.tracing():
        return False
    return all(
        type(each) in _TENSORS and each.is_cpu and each.layout is torch.strided
        and not each.is_neg() and not _torch.is_zero(each)
        for each in tensors
    )  # fmt: skip


def event_ndim_of_common_call(
    event_ndim: int | None, tensors: tuple[Any, ...], scale: str = "logvar", *absent: Any
) -> int:
    """event_ndim, which is above 0, if the tensors have one shape, dtype and device, and nothing else is given: then no
    check can fail. Else 0.

    For small latents the full checks take as long as the eager formula's forward pass.
    """
    if torch.compiler.is_compiling() or scale not in SCALES:
        return 0
    for each in absent:
        if each is not None:
            return 0
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_nested:
        return 0
    shape, dtype, device = first.shape, first.dtype, first.device
    if dtype not in DTYPES or first.layout is not torch.strided:
        return 0
    for other in tensors[1:]:
        if not isinstance(other, Tensor) or other.is_nested or other.layout is not torch.strided:
            return 0
        if other.dtype is not dtype or other.shape != shape or other.device != device:
            return 0
    if event_ndim is None:
        return len(shape) - 1 if len(shape) > 1 else len(shape)
    return event_ndim if type(event_ndim) is int and 0 < event_ndim <= len(shape) else 0


def needs_closed_form(*cotangents: Tensor | None) -> bool:
    """Whether a backward pass must use plain differentiable torch ops instead of the fused op.

    That is the case if the gradient is differentiated again (create_graph, torch.func, forward over reverse mode) or
    batched (is_grads_batched). once_differentiable would not catch every silently wrong second derivative.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return _torch.forward_mode()
    return _torch.forward_level() >= 0 or _torch.may_be_batched(cotangents)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """A faster function.apply(*args). In eager mode without torch.func it bypasses Function.apply, which binds the
    signature of a Function with setup_context at every call. That takes a third of the host time of a small loss.

    forward must name each of its arguments: torch.compile without gradients treats *settings as one argument."""
    sharding: Any = sys.modules.get("torch.distributed.tensor")
    if sharding is not None and getattr(sharding, "DTensor", None) in {*map(type, args)}:  # is_sharded, inlined
        return _sharding.apply(functools.partial(apply, function), function, args)
    if torch.compiler.is_compiling():
        if _torch.forward_mode():  # without fullgraph, the frame then runs eagerly
            raise NotImplementedError("fastkl has no forward-mode derivatives inside torch.compile")
        # torch.export drops Functions; with strict=True it would trace their no-gradient path.
        return function.forward(*args) if torch.compiler.is_exporting() else function.apply(*args)
    if _torch.forward_level() >= 0:  # even with gradients disabled
        return with_tangents(function)(*args)
    if _torch.transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    try:
        run = _APPLY[function]
    except KeyError:
        run = _APPLY[function] = _torch.apply_of(function)
    return run(*args)


_APPLY: dict[type[torch.autograd.Function], Callable[..., Any]] = {}
