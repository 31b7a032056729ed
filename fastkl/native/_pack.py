"""How a call goes to C: one list of int64. The work per call is all there is to a small latent, so little is done."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.native._build import library

MOST_DIMS = 8  # as tiles.h has it: a small struct stays in the first cache
_packers: dict[int, Callable] = {}
_functions: dict[tuple[str, str, torch.dtype], Callable | None] = {}


def function(family: str, name: str, dtype: torch.dtype, lists: int = 1) -> Callable | None:
    """A function of a library: f(numbers, [addresses,] low, high) -> 0, or 1 where memory ran out; None without one."""
    key = (family, name, dtype)
    try:
        return _functions[key]
    except KeyError:
        pass
    found = None
    if dtype in (torch.float32, torch.float64) and (loaded := library(family, dtype)) is not None:
        found = getattr(loaded, name)
        found.restype = ctypes.c_int
        found.argtypes = (*[ctypes.c_char_p] * lists, ctypes.c_double, ctypes.c_double)
    _functions[key] = found
    return found


def call(function: Callable, numbers: list[int], low: float = 0.0, high: float = 0.0) -> None:
    count = len(numbers)
    pack = _packers.get(count)
    if pack is None:
        pack = _packers[count] = struct.Struct(f"{count}q").pack
    if function(pack(*numbers), low, high):
        raise MemoryError("fastkl's native code could not allocate its partial sums")


class Plan(NamedTuple):
    """A call whose shapes, strides and settings are known: only addresses change from one to the next."""

    function: Callable
    numbers: bytes
    low: float
    high: float
    pack: Callable
    shape: tuple[int, ...]  # of the result
    halves: tuple[int, int]  # bytes from the first half of a packed tensor to the second, and in its gradient

    def run(self, seed: Tensor | None, *addresses: int) -> None:
        """With as many addresses as the C function has tensors, 0 for one that is not there."""
        threads, noise = torch.get_num_threads(), 0 if seed is None else seed.data_ptr()
        if self.function(self.numbers, self.pack(threads, noise, *addresses), self.low, self.high):
            raise MemoryError("fastkl's native code could not allocate its partial sums")


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


def halves(head: Tensor, dim: int) -> tuple[list[int], tuple[int, ...], int, int]:
    """(shape of a half, strides, address of the first, address of the second) of a tensor that packs both along dim."""
    shape, strides = list(head.shape), head.stride()
    shape[dim] //= 2
    first = head.data_ptr()
    return shape, strides, first, first + shape[dim] * strides[dim] * head.itemsize
