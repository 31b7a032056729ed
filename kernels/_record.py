"""What a launcher's call is written down as: its torch ops and launches, on tensors with numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import JITFunction


class Unknown(Exception):
    """Something that cannot be replayed."""


class Unfamiliar(Exception):
    """Something inside Triton that is not as it was in the versions that this was tried with."""


class Parameter:
    """A floating-point number that a launcher hands on to its kernels and does nothing else with: it has no arithmetic,
    and no op of torch takes it. Triton compiles the same code whatever its value."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = float(value)


class Launched(NamedTuple):
    kernel: JITFunction
    compiled: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]
    device: torch.device


class Called(NamedTuple):
    op: torch._ops.OpOverload
    args: tuple
    options: dict[str, Any]
    result: Any


class Recorder(TorchDispatchMode):
    """Lists every torch op; `launch` adds the launches. All tensors stay alive, so that each is known by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Launched | Called] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.steps.append(Called(op, args, kwargs or {}, result))
        return result


class Step(NamedTuple):
    run: Callable[[list, list, int], bool]  # of all tensors, their addresses and the stream: whether all is well
    makes: tuple[int, ...]  # tensors
    needs: tuple[int, ...]
    always: bool  # or only if something needs what it makes
    calls: bool = False  # a torch op


class Numbers:
    """The number of each tensor, and where its memory is: in which tensor's, how many bytes from its address.

    A Parameter has a number, too, and its value in the place of an address."""

    def __init__(self, inputs: list[Tensor | Parameter]) -> None:
        self.tensors: list[Tensor | Parameter] = []
        self.places: list[tuple[int, int]] = []
        self.by_id: dict[int, int] = {}
        self.storages: set[int] = set()
        self.inputs = len(inputs)
        for tensor in inputs:
            self.add(tensor)

    def add(self, tensor: Tensor | Parameter, base: Tensor | None = None) -> int:
        number = self.by_id[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        if type(tensor) is Parameter:
            self.places.append((number, 0))
            return number
        storage = tensor.untyped_storage()._cdata
        if base is None:
            if number >= self.inputs and storage in self.storages:
                raise Unknown  # a view that does not say so
            self.places.append((number, 0))
        else:
            root = self.tensors[self.places[self[base]][0]]
            if storage != root.untyped_storage()._cdata:
                raise Unknown
            self.places.append((self[root], start(tensor) - start(root)))
        self.storages.add(storage)
        return number

    def __getitem__(self, tensor: Tensor | Parameter) -> int:
        try:
            return self.by_id[id(tensor)]
        except KeyError:
            raise Unknown from None

    def own(self, tensor: Tensor) -> int:
        """The number of a tensor in memory that the call itself allocated."""
        number = self[tensor]
        if self.places[number][0] < self.inputs:
            raise Unknown
        return number


def start(tensor: Tensor) -> int:
    return tensor.storage_offset() * tensor.itemsize
