"""Shared by test files: the device, the implementations of every op, and the tolerance."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fastkl
from fastkl.ops import _call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Every kernel must compile for these targets, even without a GPU.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Choose the implementation for CPU tensors: "torch", the closed forms; "native", the loops in C (or the closed
    form if there is none); "triton", the kernels (interpreted or emulated).

    On a GPU the dispatcher always uses the kernels.
    """
    if DEVICE == "cuda":
        yield
        return
    chosen = {
        "torch": _call.CLOSED_FORM,
        "native": _call.CLOSED_FORM | _call.NATIVE,
        "triton": _call.TRITON,
    }[name]
    if name == "triton":
        importlib.import_module("fastkl.kernels._launch").forget()  # a test may have changed the tiles
    with pytest.MonkeyPatch.context() as patch, poisoned_memory() if name != "torch" else contextlib.nullcontext():
        for op, function in chosen.items():
            patch.setitem(_call.CPU, op, function)
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty and its relatives with NaN, which shows an output that a kernel does not write."""
    _let_the_compiler_learn_torch()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@functools.cache
def _let_the_compiler_learn_torch() -> None:
    """torch.compile lists torch's functions at its first use, which must not find the replaced ones."""
    torch.compile(torch.empty_like, backend="eager")(torch.zeros(1))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    return allocate_nan


class Package:
    """A package that results are compared with, such as `scipy.stats`. If it is missing, only the tests that use it are
    skipped."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(pytest.importorskip(self.name), attribute)


def search_path(first: Path) -> str:
    """The PYTHONPATH for processes that tests start: `first`, then the tests' own."""
    return os.pathsep.join(filter(None, [str(first), os.environ.get("PYTHONPATH")]))


def launcher(path: str) -> Callable:
    """Of a kernel: "kl_normal.fwd", in whichever family it is."""
    module, function = path.rsplit(".", 1)
    (file,) = (Path(fastkl.__file__).parents[1] / "kernels").rglob(f"{module}.py")
    return getattr(importlib.import_module(f"fastkl.kernels.{file.parent.name}.{module}"), function)


def assert_as_good_as_eager(actual, eager, exact, *, units: float = 4.0, scale=None) -> None:
    """The contract: the error against float64 is at most that of eager PyTorch in this dtype, plus rounding.

    Rounding is `units` in the last place of the result's dtype, relative to `scale` (default: the exact value).
    """
    assert actual.shape == exact.shape
    assert not (actual.isnan() & ~exact.isnan()).any(), "NaN where the exact result has none: unwritten output?"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    allowed = (eager.double() - exact).abs().nan_to_num(posinf=float("inf")).max()
    rounding = units * torch.finfo(actual.dtype).eps * (exact.abs() if scale is None else scale)
    worst = (error - rounding).max().item()
    assert worst <= allowed.item(), f"error {error.max().item():.3e}, eager's {allowed.item():.3e}"


def peak_bytes(function: Callable[[], object]) -> int:
    """The peak of CPU memory, in bytes, that `function` allocates, from the profiler's record of allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def on_any_threads(function: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """The result of function() on one thread, after checking that it is bit-identical on two."""
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
    return results[0]


def empty_like(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Outputs for the gradients of these, None for one that is not there."""
    return [None if tensor is None else torch.empty_like(tensor) for tensor in tensors]


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(DEVICE).requires_grad_()
