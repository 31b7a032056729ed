"""Kernel launches: directly, or by a plan that is cached for tensors of the same shapes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

ALIGNMENT = 16  # bytes: Triton specialises on whether an address is a multiple of this


def launch(kernel, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """kernel[grid](*args, **options) on the tensors' device, which may not be the current one."""
    device = device_of(args)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return kernel[grid](*args, **options)
    return kernel[grid](*args, **options)


def device_of(args: tuple) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))


def choice(arg: Any) -> Any:
    """The properties of an argument on which Triton specialises; they do not include the value of a float."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % ALIGNMENT
    return float if type(arg) is float else arg


_PLANNERS: list[Any] = []


def planned(function):
    """Cache the latest results of a function that maps views of tensors (kernels._layout) and settings to a Plan."""
    kept = functools.lru_cache(maxsize=512)(function)
    _PLANNERS.append(kept)
    return kept


def forget() -> None:
    """Drop all cached plans, after the tiles have changed."""
    for planner in _PLANNERS:
        planner.cache_clear()


class Plan:
    """A prepared launch that lacks only its first arguments: the tensors and numbers of one call.

    `rest` are the kernel's other arguments before its constants, which are in the options. kernel[grid] inspects every
    argument to find the compiled code; a plan caches the code per kinds of first arguments and launches it directly.
    """

    def __init__(self, kernel, grid: tuple[int, ...], *rest: Any, **options: Any) -> None:
        self.kernel, self.grid, self.rest, self.options = kernel, grid, rest, options
        constants = [options[name] for name in kernel.arg_names if name in options]
        self.all_of_rest, self.whole_grid = (*rest, *constants), (*grid, 1, 1)[:3]
        self.compiled: dict[tuple, Any] = {}

    def launch(self, *first: Any) -> None:
        """Launch on the current device, by the cached code if there is any. Does nothing if the grid is empty."""
        if 0 in self.grid:
            return
        device = device_of(first)
        key = (device, *map(choice, first))
        compiled = self.compiled.get(key)
        if compiled is None or (device.type == "cuda" and device.index != torch.cuda.current_device()):
            compiled = launch(self.kernel, self.grid, *first, *self.rest, **self.options)
            if isinstance(compiled, CompiledKernel):  # false in the interpreter
                self.compiled[key] = compiled
        else:
            compiled[self.whole_grid](*first, *self.all_of_rest)

    def sums(self, shape: tuple[int, ...], dtype: torch.dtype, *first: Any) -> Tensor:
        """Launch with an output [splits, ...] of this shape after `first`, and return its sum over the splits."""
        found = first[0].new_empty(shape[shape[0] == 1 :], dtype=dtype)
        self.launch(*first, found)
        return found if shape[0] == 1 else found.sum(0)
