"""How a call goes to C: one list of int64. The work per call is all there is to a small latent, so little is done."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from fastkl.native._build import library

MOST_DIMS = 16  # as tiles.h has it
_packers: dict[int, Callable] = {}
_functions: dict[tuple[str, str, torch.dtype], Callable | None] = {}


def function(family: str, name: str, dtype: torch.dtype) -> Callable | None:
    """A function of a library: f(numbers, low, high) -> 0, or 1 where memory ran out; None where there is none."""
    key = (family, name, dtype)
    try:
        return _functions[key]
    except KeyError:
        pass
    found = None
    if dtype in (torch.float32, torch.float64) and (loaded := library(family, dtype)) is not None:
        found = getattr(loaded, name)
        found.argtypes, found.restype = (ctypes.c_char_p, ctypes.c_double, ctypes.c_double), ctypes.c_int
    _functions[key] = found
    return found


def call(function: Callable, numbers: list[int], low: float = 0.0, high: float = 0.0) -> None:
    count = len(numbers)
    pack = _packers.get(count)
    if pack is None:
        pack = _packers[count] = struct.Struct(f"{count}q").pack
    if function(pack(*numbers), low, high):
        raise MemoryError("fastkl's native code could not allocate its partial sums")


def halves(head: Tensor, dim: int) -> tuple[list[int], tuple[int, ...], int, int]:
    """(shape of a half, strides, address of the first, address of the second) of a tensor that packs both along dim."""
    shape, strides = list(head.shape), head.stride()
    shape[dim] //= 2
    first = head.data_ptr()
    return shape, strides, first, first + shape[dim] * strides[dim] * head.itemsize
