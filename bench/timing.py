"""Contenders take turns, round by round, so that a machine that changes its speed changes it for all of them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import mmap
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.budget import Budget
from bench.counting import allocations


class Contender(NamedTuple):
    """A step in two parts. The second frees what the first has made."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]

    def both(self) -> None:
        """One step."""
        self.backward(self.forward())

    def turn(self, repeats: int, device: str) -> tuple[float, float]:
        """Seconds per step, forward and backward: by CUDA events on a GPU, by the wall clock elsewhere. Where the host
        takes longer to launch a step than the GPU to run it, events tell the host's time, as a training loop has it;
        bench/gpu.py times the kernels alone."""
        clock = recorded if device == "cuda" else time.perf_counter
        marks = []
        for _ in range(repeats):
            start = clock()
            outputs = self.forward()
            middle = clock()
            self.backward(outputs)
            del outputs
            marks.append((start, middle, clock()))
        if device == "cuda":
            torch.cuda.synchronize()
            return tuple(sum(mark[i].elapsed_time(mark[i + 1]) for mark in marks) / 1e3 / repeats for i in (0, 1))
        return tuple(sum(mark[i + 1] - mark[i] for mark in marks) / repeats for i in (0, 1))


class Pace(NamedTuple):
    """How long to measure."""

    rounds: int = 7
    round_seconds: float = 0.02  # of each contender
    seconds: float = 5.0  # of all of them together, where a single step is long: then there are fewer rounds
    warm_seconds: float = 0.003  # of each turn, at least a step, before it counts


BRISK = Pace(5, 0.01, 2.5)
QUICK = Pace(5, 0.005, 2.0)
FEWEST_ROUNDS = 3
FEWEST_LONG_ROUNDS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LEAST_KEPT, MOST_KEPT = 128 << 10, 32 << 20  # bytes: where its limit begins, and where it ends
OVERHEAD = 128  # bytes of a block beyond the tensor's, for its alignment to 64 and malloc's own
LONG = 0.25  # seconds of a step of which there are few: all count


class Spread(NamedTuple):
    """Quartiles over the rounds."""

    low: float
    median: float
    high: float


class Times(NamedTuple):
    """Seconds per step, one value for each round."""

    forward: list[float]
    backward: list[float]

    @property
    def both(self) -> list[float]:
        return [a + b for a, b in zip(self.forward, self.backward)]


def spread(values: list[float]) -> Spread:
    if len(values) < 2:
        return Spread(*values * 3)
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def ratio(times: Times, over: Times) -> Spread:
    """How many times `times` takes as long as `over`, of rounds that ran side by side."""
    return spread([a / b for a, b in zip(times.both, over.both)])


def repeats_of(seconds: float, pace: Pace) -> int:
    """Steps of one turn; three at least, where that is not long."""
    return min(10_000, max(1 if seconds > LONG / 3 else 3, math.ceil(pace.round_seconds / seconds)))


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(contenders: dict[str, Contender], device: str, pace: Pace) -> dict[str, Times]:
    """Interleaved rounds of all contenders.

    The first steps, which set things up, are not counted, nor are the first of every turn: they pay for the heap and
    the caches as the contender before has left them, and for its threads, which go on waiting for work a while. Of a
    long step all are counted, but of the first those that took twice as long as another.
    """
    if not contenders:
        return {}
    once, found = {}, {}
    for name, contender in contenders.items():
        steps = [contender.turn(1, device) for _ in "12"]
        if LONG <= sum(steps[1]) < 4 * LONG:  # a second that still sets things up
            steps.append(contender.turn(1, device))
        least = min(map(sum, steps))
        long = least >= LONG
        kept = [step for step in steps if sum(step) <= 2 * least] if long else []
        found[name] = Times([forward for forward, _ in kept], [backward for _, backward in kept])
        once[name] = least if long else min(sum(contender.turn(1, device)) for _ in "123")
    known = {name: len(times.forward) for name, times in found.items()}
    warm = {name: math.ceil(pace.warm_seconds / once[name]) for name, count in known.items() if not count}
    repeats = {name: repeats_of(seconds, pace) for name, seconds in once.items()}
    total = sum(once[name] * (repeats[name] + warm.get(name, 0)) for name in contenders)
    rounds = max(FEWEST_ROUNDS, min(pace.rounds, math.floor(pace.seconds / total)))
    long_rounds = rounds if rounds > FEWEST_ROUNDS else FEWEST_LONG_ROUNDS
    with without_collection():
        for number in range(rounds):
            for name, contender in contenders.items():
                if number < known[name] or (known[name] and number >= long_rounds):
                    continue
                if name in warm:
                    contender.turn(warm[name], device)
                forward, backward = contender.turn(repeats[name], device)
                found[name].forward.append(forward)
                found[name].backward.append(backward)
    return found


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Garbage is collected before, not in the middle of a round."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def heap_of(contender: Contender | None, device: str) -> Iterator[None]:
    """malloc's limits as they are in a process that takes this contender's steps and has had nothing larger.

    glibc maps a block above its limit anew each time, gives the end of the heap back above twice the limit, and raises
    the limit to a mapped block that is freed, up to 32 MiB. It never lowers it: else whether a step pays for the pages
    of its tensors would depend on what was measured before. Other allocators are left alone.
    """
    if contender is None or device != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    blocks = [size + OVERHEAD for size in allocations(contender.both)]
    limit_heap(max((size for size in blocks if size <= MOST_KEPT), default=0))
    try:
        yield
    finally:
        limit_heap(MOST_KEPT)


def limit_heap(largest: int) -> None:
    """As where a block of so many bytes was the largest."""
    kept = max(LEAST_KEPT, -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE)
    set_limit = ctypes.CDLL(None).mallopt
    set_limit(M_MMAP_THRESHOLD, kept)
    set_limit(M_TRIM_THRESHOLD, 2 * kept if kept > LEAST_KEPT else kept)


def copy(budget: Budget, device: str) -> Contender:
    """A copy that moves as many bytes as the op's kernels must, between tensors that exist already: the yardstick."""
    parts = []
    for size in budget:
        source = torch.ones(max(1, size // 8), device=device)  # half of the bytes are read, half are written
        parts.append((torch.empty_like(source).fill_(0), source))
    return Contender(lambda: parts[0][0].copy_(parts[0][1]), lambda _: parts[1][0].copy_(parts[1][1]))


def limit(outputs: list[Tensor], inputs: list[Tensor]) -> Contender:
    """Allocates and fills the outputs and the gradients: what no op that returns new tensors can be faster than."""
    wanted = [tensor.detach() for tensor in inputs if tensor.requires_grad]
    outputs = [tensor.detach() for tensor in outputs]

    def backward(kept: list[Tensor]) -> None:
        [torch.ones_like(tensor) for tensor in wanted]

    return Contender(lambda: [torch.ones_like(tensor) for tensor in outputs], backward)
