"""How a call goes to C, in as few steps as can be: a small latent is bound by the host."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.native._build import library

NO_MEMORY = "fastkl's native code could not allocate its partial sums"
MOST_DIMS = 8  # as tiles.h has it: a small struct stays in the first cache
_functions: dict[tuple[str, str, torch.dtype], Callable | None] = {}


def function(family: str, name: str, dtype: torch.dtype) -> Callable | None:
    """A function of a library: f(numbers, addresses, low, high) -> 0, or 1 where memory ran out; None without one."""
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
    """A call whose shapes, strides and settings are known: only addresses change from one to the next."""

    function: Callable
    numbers: bytes
    pack: Callable  # of the addresses
    low: float = 0.0
    high: float = 0.0
    dtype: torch.dtype = torch.float32  # what is computed in, and that of a value for each row
    result: tuple[int, ...] = ()  # its shape

    def run(self, *addresses: int) -> None:
        """With as many addresses as the C function takes, 0 for what is not there."""
        self.run_at(self.low, self.high, *addresses)

    def run_at(self, low: float, high: float, *addresses: int) -> None:
        if self.function(self.numbers, self.pack(torch.get_num_threads(), *addresses), low, high):
            raise MemoryError(NO_MEMORY)


# How a tensor's elements lie in memory, as halves.h has it; float64 is a library of its own, and by itself.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DOUBLE = {torch.float64: 0}


def prepare(
    family: str, name: str, settings: Iterable[int], shape, event_ndim: int, tensors: Iterable, strides,
    others: int = 0, **more,
) -> Plan | None:  # fmt: skip
    """The plan of a function of tensors (None: not there, or one value in the dtype that is computed in) with these
    strides in the dimensions of `shape`, and of `others` addresses beside theirs. None where float64 is mixed with
    other dtypes, or there are too many dimensions."""
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


# Key -> plan, or None for what is the closed form's. A key has all that a plan depends on.
plans: dict[tuple, Plan | None] = {}
MOST_PLANS = 1024


def keep(key: tuple, plan: Plan | None) -> Plan | None:
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def known(tensors) -> tuple:
    """What a plan depends on of each tensor, None of one that is not there."""
    found = []
    for tensor in tensors:
        found += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
    return tuple(found)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
