"""Calls to C with as little Python as possible, because Python takes most of the time for small latents."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl.native._build import library

NO_MEMORY = "fastkl's native code could not allocate its partial sums"
MOST_DIMS = 8  # as in tiles.h: a small struct stays in the L1 cache
_functions: dict[tuple[str, str, torch.dtype], Callable | None] = {}


def function(family: str, name: str, dtype: torch.dtype) -> Callable | None:
    """A library's function: f(numbers, addresses, low, high) -> 0, or 1 if out of memory. None without a library."""
    key = (family, name, dtype)
    try:
        return _functions[key]
    except KeyError:
        pass
    found = None
    if dtype in (torch.float32, torch.float64) and (loaded := library(family, dtype)) is not None:
        found = getattr(loaded, name)
        found.restype = ctypes.c_int
        found.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_double, ctypes.c_double)
    _functions[key] = found
    return found


class Plan(NamedTuple):
    """A call with fixed shapes, strides and settings; only addresses change between calls."""

    function: Callable
    numbers: bytes
    pack: Callable  # packs the addresses
    low: float = 0.0
    high: float = 0.0
    dtype: torch.dtype = torch.float32  # the compute dtype, and that of one value per row
    result: tuple[int, ...] = ()  # the shape of this value

    def run(self, *tensors: Tensor | None) -> None:
        """Call with all tensors of the C function, None for a missing one."""
        self.run_at(self.low, self.high, *tensors)

    def run_at(self, low: float, high: float, *tensors: Tensor | None) -> None:
        """`run` with other numbers than those of the plan."""
        addresses = []
        for tensor in tensors:
            addresses.append(0 if tensor is None else tensor.data_ptr())
        if self.function(self.numbers, self.pack(torch.get_num_threads(), *addresses), low, high):
            raise MemoryError(NO_MEMORY)


# A tensor's element type, as in halves.h. float64 has its own library, and is not mixed with other types.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DOUBLE = {torch.float64: 0}


def prepare(
    family: str, name: str, settings: Iterable[int], shape, event_ndim: int, tensors: Iterable, strides,
    others: int = 0, **more,
) -> Plan | None:  # fmt: skip
    """The plan of a function of tensors with these strides in the dimensions of `shape`, plus `others` addresses.

    A tensor is None if it is missing or is one value in the compute dtype. The plan is None if float64 is mixed with
    other dtypes, or if there are too many dimensions.
    """
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    kinds, wide = (DOUBLE, torch.float64) if torch.float64 in dtypes else (KINDS, torch.float32)
    if len(shape) > MOST_DIMS or not kinds.keys() >= {*dtypes} - {None}:
        return None
    found = function(family, name, wide)
    if found is None:
        return None
    numbers = [*settings, len(shape), event_ndim, *shape]
    for dtype, own in zip(dtypes, strides, strict=True):
        numbers += (0 if dtype is None else kinds[dtype], *own)
    pack = struct.Struct(f"{1 + others + len(strides)}q").pack
    return Plan(found, struct.pack(f"{len(numbers)}q", *numbers), pack, dtype=wide, **more)


# Key -> plan, or None to use the closed form. A key contains everything that the plan depends on.
plans: dict[tuple, Plan | None] = {}
MOST_PLANS = 1024


def keep(key: tuple, plan: Plan | None) -> Plan | None:
    """Store a plan and return it."""
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def known(tensors) -> tuple:
    """The part of a key for these tensors: shape, stride and dtype, or None for a missing one."""
    found: list[Any] = []
    for tensor in tensors:
        found += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
    return tuple(found)
