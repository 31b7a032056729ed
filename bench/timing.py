"""Interleaved timing: contenders alternate round by round, so a change of the machine's speed affects all of them."""

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
    """A step in two parts. The backward part frees the forward part's tensors."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]

    def both(self) -> None:
        """One step."""
        self.backward(self.forward())

    def turn(self, repeats: int, device: str) -> tuple[float, float]:
        """Seconds per step, forward and backward: by CUDA events on a GPU, by the wall clock elsewhere. If the host
        takes longer to launch a step than the GPU to run it, events measure the host's time, as in a training loop;
        bench/gpu.py times only the kernels."""
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
    """The duration of a measurement."""

    rounds: int = 7
    round_seconds: float = 0.02  # per contender and round
    seconds: float = 5.0  # for all contenders together; long steps get fewer rounds
    warm_seconds: float = 0.003  # warm-up of each turn, at least one step, not counted


BRISK = Pace(5, 0.01, 2.5)
QUICK = Pace(5, 0.005, 2.0)
FEWEST_ROUNDS = 3
FEWEST_LONG_ROUNDS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
LARGE_PAGE, FRESH = 2 << 20, 32 << 20  # bytes: as in fastkl/native/tiles.h
LEAST_KEPT, MOST_KEPT = 128 << 10, 32 << 20  # bytes: range of glibc's dynamic mmap threshold
OVERHEAD = 128  # bytes of a block beyond the tensor's, for the alignment to 64 and malloc's header
LONG = 0.25  # seconds: of a longer step few are timed, and all of them count


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
    """The ratio of `times` to `over`, within the same rounds."""
    return spread([a / b for a, b in zip(times.both, over.both)])


def repeats_of(seconds: float, pace: Pace) -> int:
    """Steps per turn: at least three, unless that takes long."""
    return min(10_000, max(1 if seconds > LONG / 3 else 3, math.ceil(pace.round_seconds / seconds)))


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(contenders: dict[str, Contender], device: str, pace: Pace) -> dict[str, Times]:
    """Interleaved rounds of all contenders.

    The first steps do set-up work and are not counted. Nor are the first steps of every turn: they pay for the heap and
    the caches that the previous contender has left, and for its threads, which spin for a while. Long steps are all
    counted, except first steps that took twice as long as another.
    """
    if not contenders:
        return {}
    once, found = {}, {}
    for name, contender in contenders.items():
        steps = [contender.turn(1, device) for _ in "12"]
        if LONG <= sum(steps[1]) < 4 * LONG:  # the second step may still do set-up work
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
    """Collect garbage before the rounds, and not during them."""
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
    """Set malloc's thresholds to those of a process that only runs this contender's steps.

    glibc maps a block above its threshold again each time, returns the end of the heap above twice the threshold, and
    raises the threshold to the size of a freed mapped block, up to 32 MiB. It never lowers it. Without this function,
    earlier measurements would decide whether a step pays for the pages of its tensors. Other allocators are unchanged.
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
    """Set malloc's thresholds to those after a largest block of so many bytes."""
    kept = max(LEAST_KEPT, -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE)
    set_limit = ctypes.CDLL(None).mallopt
    set_limit(M_MMAP_THRESHOLD, kept)
    set_limit(M_TRIM_THRESHOLD, 2 * kept if kept > LEAST_KEPT else kept)


def copy(budget: Budget, device: str) -> Contender:
    """The yardstick: a copy with the traffic of the op's kernels, between existing tensors."""
    parts = []
    for size in budget:
        source = torch.ones(max(1, size // 8), device=device)  # half of the bytes are read, half are written
        parts.append((torch.empty_like(source).fill_(0), source))
    return Contender(lambda: parts[0][0].copy_(parts[0][1]), lambda _: parts[1][0].copy_(parts[1][1]))


def filled_like(tensor: Tensor) -> Tensor:
    """A new tensor of ones. The system is asked for large pages for a large one, as fastkl's loops in C do."""
    new = torch.empty_like(tensor)
    begin = -(-new.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    size = (new.data_ptr() + new.nbytes) // LARGE_PAGE * LARGE_PAGE - begin
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # on Linux
    if new.device.type == "cpu" and new.nbytes >= FRESH and advice is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), advice)
    return new.fill_(1)


def limit(outputs: list[Tensor], inputs: list[Tensor]) -> Contender:
    """The lower limit of any op that returns new tensors: it only allocates and fills outputs and gradients."""
    wanted = [tensor.detach() for tensor in inputs if tensor.requires_grad]
    outputs = [tensor.detach() for tensor in outputs]

    def backward(kept: list[Tensor]) -> None:
        [filled_like(tensor) for tensor in wanted]

    return Contender(lambda: [filled_like(tensor) for tensor in outputs], backward)
