"""Counts of a step, the same on every machine: bytes moved and saved, and kernel launches."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.budget import touched

# Ops that only write: they use the shape of their tensor argument. And ops that move no data.
FILL = re.compile(r"(new_)?(ones|zeros|full|rand|randn|randint|normal|uniform|bernoulli|exponential|fill|zero|arange)")
NOTHING = re.compile(r"(new_)?empty|detach|alias|lift_fresh|_local_scalar_dense|is_same_size|_has_")


class Traffic(NamedTuple):
    read: int
    written: int
    launches: int

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def minus(self, other: Traffic) -> Traffic:
        return Traffic(*(a - b for a, b in zip(self, other)))


class Counter(TorchDispatchMode):
    """Sums the reads and writes of each dispatched op: each tensor's distinct elements once, and nothing for views.

    It does not see passes inside an op such as logsumexp; its counts are lower bounds for those.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {}, result)
        return result

    def count(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = func._schema.name.partition("::")[2]
        written = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        values = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        changed = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        inputs = {name: [x for x in tree_leaves(value) if isinstance(x, Tensor)] for name, value in values.items()}
        storages = {x.untyped_storage()._cdata for group in inputs.values() for x in group}
        view = not changed and written and all(x.untyped_storage()._cdata in storages for x in written)
        if view or NOTHING.match(name) or not any(x.numel() for x in written):
            return
        self.launches += 1
        self.written += sum(map(touched, written))
        if FILL.match(name):
            return
        # An in-place op also reads its argument, except copy_.
        overwritten = changed if name == "copy_" else ()
        self.read += sum(touched(x) for key, group in inputs.items() if key not in overwritten for x in group)

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.read, self.written, self.launches)


def count_eager(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> tuple[Traffic, Traffic]:
    """The traffic of the forward and of the backward pass."""
    with Counter() as counter:
        outputs = forward()
        before = counter.traffic
        backward(outputs)
    return before, counter.traffic.minus(before)


class Graphs(NamedTuple):
    """Graphs compiled by Inductor: bytes by Inductor's account, and numbers of loop nests (on a GPU, kernels)."""

    bytes: list[int]
    launches: list[int]

    def total(self) -> Traffic:
        return Traffic(sum(self.bytes), 0, sum(self.launches))


@contextlib.contextmanager
def inductor_account(cached: bool = False) -> Iterator[Graphs]:
    """Every graph that Inductor compiles in this context, in order: forward, then backward.

    Graphs from its cache are not recorded. With `cached` Inductor may use that cache; without, it compiles every graph,
    and only the resulting C++ or Triton code may come from a cache.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    graphs, own = Graphs([], []), GraphLowering.save_output_code

    def note(code: str) -> None:  # Inductor calls it for the code of each graph, new or cached
        if not isinstance(V.graph, GraphLowering):
            return
        nodes = [node for node in V.graph.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        graphs.bytes.append(sum(node.get_read_write_buffers_sizes() for node in nodes))
        graphs.launches.append(len(nodes))

    caches = config.patch(fx_graph_cache=cached), functorch.patch(enable_autograd_cache=cached)
    GraphLowering.save_output_code = staticmethod(note)
    try:
        with caches[0], caches[1]:
            yield graphs
    finally:
        GraphLowering.save_output_code = own


def saved_bytes(function: Callable, inputs: list[Tensor]) -> int:
    """Bytes that the forward pass saves for the backward pass beyond its inputs; each storage counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, tuple[int, Tensor]] = {}  # keeps the tensors alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(*inputs)
    del outputs
    return sum(size for size, _ in kept.values())


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Peak of the bytes that a step allocates, including outputs and gradients, without the inputs."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(itertools.accumulate(allocations(step), initial=0))


def allocations(step: Callable[[], object]) -> list[int]:
    """Bytes of each block of CPU memory that a step allocates, in order; negative for a freed block."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def gpu_launches(step: Callable[[], object]) -> int:
    """The number of kernels that a step launches, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    ours = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in ours)  # named ranges are not kernels
