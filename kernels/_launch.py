"""How a kernel is launched: at once, or by a plan that is made once for tensors of the same shapes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

ALIGNMENT = 16  # bytes: what Triton asks about an address


def launch(kernel, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """kernel[grid](*args, **options) on the device of its tensors, which need not be the current one."""
    device = device_of(args)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return kernel[grid](*args, **options)
    return kernel[grid](*args, **options)


def device_of(args: tuple) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))


def choice(arg: Any) -> Any:
    """What Triton's choice of code depends on of an argument: a float's value is none of it."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % ALIGNMENT
    return float if type(arg) is float else arg


_PLANNERS: list[Any] = []


def planned(function):
    """For a function from the views of tensors (kernels._layout) and settings to a Plan: its last results are kept."""
    kept = functools.lru_cache(maxsize=512)(function)
    _PLANNERS.append(kept)
    return kept


def forget() -> None:
    """Every plan is made anew: the tiles have changed."""
    for planner in _PLANNERS:
        planner.cache_clear()


class Plan:
    """A launch but for its first arguments, the tensors and numbers of a call.

    `rest` are the kernel's other arguments up to its constants, which are among the options. kernel[grid] would look at
    every argument to find its code; what it found for first arguments of the same kinds is launched again directly.
    """

    def __init__(self, kernel, grid: tuple[int, ...], *rest: Any, **options: Any) -> None:
        self.kernel, self.grid, self.rest, self.options = kernel, grid, rest, options
        constants = [options[name] for name in kernel.arg_names if name in options]
        self.all_of_rest, self.whole_grid = (*rest, *constants), (*grid, 1, 1)[:3]
        self.compiled: dict[tuple, Any] = {}

    def launch(self, *first: Any) -> None:
        """Nothing where the grid is empty. By the compiled code where it is known, on the current device."""
        if 0 in self.grid:
            return
        device = device_of(first)
        key = (device, *map(choice, first))
        compiled = self.compiled.get(key)
        if compiled is None or (device.type == "cuda" and device.index != torch.cuda.current_device()):
            compiled = launch(self.kernel, self.grid, *first, *self.rest, **self.options)
            if isinstance(compiled, CompiledKernel):  # not so in the interpreter
                self.compiled[key] = compiled
        else:
            compiled[self.whole_grid](*first, *self.all_of_rest)

    def sums(self, shape: tuple[int, ...], dtype: torch.dtype, *first: Any) -> Tensor:
        """What its splits find, [splits, ...] of this shape, added up; the kernel's output follows `first`."""
        found = first[0].new_empty(shape[shape[0] == 1 :], dtype=dtype)
        self.launch(*first, found)
        return found if shape[0] == 1 else found.sum(0)
