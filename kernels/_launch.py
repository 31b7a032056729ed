"""Kernel launches: directly, or by a plan that is cached for tensors of the same shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from fastkl.kernels._layout import contiguous, views

ALIGNMENT = 16  # bytes: Triton specialises on whether an address is a multiple of this


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """kernel[grid](*args, **options) on the tensors' device, which may not be the current one."""
    device = device_of(args)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return kernel[grid](*args, **options)
    return kernel[grid](*args, **options)


def device_of(args: Sequence[Any]) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))


def choice(arg: Any) -> Any:
    """The properties of an argument on which Triton specialises; they do not include the value of a float."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % ALIGNMENT
    return float if type(arg) is float else arg


_PLANNERS: list[Any] = []
Planner = TypeVar("Planner", bound=Callable[..., Any])


def planned(function: Planner) -> Planner:
    """Cache the latest results of a function that maps views of tensors (kernels._layout) and settings to a Plan."""
    kept = functools.lru_cache(maxsize=512)(function)
    _PLANNERS.append(kept)
    return cast(Planner, kept)


def forget() -> None:
    """Drop all cached plans, after the tiles have changed."""
    for planner in _PLANNERS:
        planner.cache_clear()


class Plan:
    """A prepared launch that lacks only its first arguments: the tensors and numbers of one call.

    `rest` are the kernel's other arguments before its constants, which are in the options. kernel[grid] inspects every
    argument to find the compiled code; a plan caches the code per kinds of first arguments and launches it directly.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *rest: Any, **options: Any) -> None:
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


# A launch, the shape of its output with the splits in front, and its dtype.
Sums = tuple[Plan, tuple[int, ...], torch.dtype]


def sums(plan_fwd: Callable[..., Sums | None], inputs: Sequence[Any], *settings: Any) -> Tensor:
    """The launch of `plan_fwd` with an output [splits, ...] after the inputs, summed over the splits.

    Inputs whose views have no plan, because no two dimensions an axis describe them, are copied.
    """
    found = plan_fwd(views(*inputs), *settings)
    if found is None:
        return sums(plan_fwd, contiguous(*inputs), *settings)
    plan, shape, dtype = found
    output = inputs[0].new_empty(shape[shape[0] == 1 :], dtype=dtype)
    plan.launch(*inputs, output)
    return output if shape[0] == 1 else output.sum(0)
