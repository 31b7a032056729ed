"""Contenders take turns, round by round, so that a machine that changes its speed changes it for all of them."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.budget import Budget


class Contender(NamedTuple):
    """A step in two parts. The second frees what the first has made."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


class Pace(NamedTuple):
    """How long to measure."""

    rounds: int = 9
    round_seconds: float = 0.02  # of each contender
    seconds: float = 8.0  # of all of them together, where a single step is long: then there are fewer rounds


QUICK = Pace(5, 0.005, 2.0)
FEWEST_ROUNDS = 3
LONG = 0.25  # seconds of a step of which there are few: its first counts


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


def one_round(contender: Contender, repeats: int, device: str) -> tuple[float, float]:
    """Seconds per step, forward and backward: by CUDA events on a GPU, by the wall clock elsewhere."""
    clock = recorded if device == "cuda" else time.perf_counter
    marks = []
    for _ in range(repeats):
        start = clock()
        outputs = contender.forward()
        middle = clock()
        contender.backward(outputs)
        del outputs
        marks.append((start, middle, clock()))
    if device == "cuda":
        torch.cuda.synchronize()
        return tuple(sum(mark[i].elapsed_time(mark[i + 1]) for mark in marks) / 1e3 / repeats for i in (0, 1))
    return tuple(sum(mark[i + 1] - mark[i] for mark in marks) / repeats for i in (0, 1))


def repeats_of(seconds: float, pace: Pace) -> int:
    """Steps of one turn; three at least, where that is not long."""
    return min(10_000, max(1 if seconds > LONG / 3 else 3, math.ceil(pace.round_seconds / seconds)))


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(contenders: dict[str, Contender], device: str, pace: Pace) -> dict[str, Times]:
    """Interleaved rounds of all contenders.

    The first steps, which set things up, are not counted, nor is the first step of every turn: it pays for the heap and
    the caches as the contender before has left them. Of a long step every one is counted.
    """
    if not contenders:
        return {}
    once, found = {}, {}
    for name, contender in contenders.items():
        forward, backward = one_round(contender, 1, device)
        long = forward + backward >= LONG
        once[name] = forward + backward if long else min(sum(one_round(contender, 1, device)) for _ in "123")
        found[name] = Times([forward], [backward]) if long else Times([], [])
    warm = {name for name in contenders if not found[name].forward}  # a step before each turn
    repeats = {name: repeats_of(seconds, pace) for name, seconds in once.items()}
    total = sum(once[name] * (repeats[name] + (name in warm)) for name in contenders)
    rounds = max(FEWEST_ROUNDS, min(pace.rounds, math.floor(pace.seconds / total)))
    with without_collection():
        for number in range(rounds):
            for name, contender in contenders.items():
                if name in warm:
                    one_round(contender, 1, device)
                elif number == 0:
                    continue  # there is its first already
                forward, backward = one_round(contender, repeats[name], device)
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
