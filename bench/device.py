"""Time of kernels on the device, without the host's time.

On a GPU a step is captured in a CUDA graph, and events around its replay give the time. If it cannot be captured, the
stream first gets other work for as long as the host needs to launch the step. Before each run a buffer larger than the
L2 cache is read (not written: dirty lines would be written back during the step). Contenders are interleaved. On a CPU
the wall clock gives the time.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch

from bench.timing import Contender

WARM = 2  # steps before a capture, which compile the kernels
FLUSHED = 256 << 20  # bytes; at least four times the L2 cache are read
FEWEST = 3  # rounds of a long step


class Turn(NamedTuple):
    """A function to time. `before` runs before each call and is not timed."""

    run: Callable[[], Any]
    how: str
    before: Callable[[], Any] | None = None
    host_ms: float = 0.0  # the host's time to launch it, if it is not a graph


class Measured(NamedTuple):
    """Quartiles over the rounds, in milliseconds."""

    low: float
    median: float
    high: float
    how: str


class Flush:
    """A read of a large buffer, which flushes the L2 cache and keeps the device busy."""

    def __init__(self, device: str) -> None:
        self.milliseconds, self.buffer = 0.05, None
        if device == "cuda":
            cache = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
            self.buffer = torch.zeros(max(FLUSHED, 4 * cache) // 4, device=device)
            self.sink = torch.zeros((), device=device)
            for _ in range(3):
                self(1)
            torch.cuda.synchronize()
            start = event()
            self(10)
            stop = event()
            stop.synchronize()
            self.milliseconds = start.elapsed_time(stop) / 10

    def __call__(self, times: int) -> None:
        if self.buffer is not None:
            for _ in range(times):
                torch.sum(self.buffer, 0, out=self.sink)


def event() -> torch.cuda.Event:
    """An event recorded now."""
    recorded = torch.cuda.Event(enable_timing=True)
    recorded.record()
    return recorded


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A side stream, which a capture needs, synchronised with the current stream at both ends."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def capture(step: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(the graph of a step, the step's result), captured on the current stream. torch.cuda.graph is not used, because
    it collects garbage and empties the allocator's cache each time."""
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # freeing another graph during a capture would invalidate it
    try:
        graph.capture_begin(*(() if pool is None else (pool,)))
        try:
            result = step()
        finally:
            graph.capture_end()
    finally:
        if collects:
            gc.enable()
    return graph, result


def waits(step: Callable[[], Any]) -> str:
    """The reason why a step synchronises with the device, forward or backward, or "" if it does not.

    This is checked before a capture, because a failed capture leaves torch's generator and allocator unusable.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"waits: {error}".splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def turns_of(step: Contender, device: str, differentiates: bool = True, graphs: bool = True) -> dict[str, Turn]:
    """Direction -> turn: forward, and for differentiable steps also backward and both. `graphs=False` saves the private
    memory of CUDA graphs; the step is then timed like one that cannot be captured."""
    if device != "cuda":
        step.both()
        return plain(step, "wall", 0.0, differentiates)
    # Without a graph, the warm-up runs on the timed stream, because the allocator's memory belongs to a stream.
    with side_stream() if graphs else contextlib.nullcontext():
        for _ in range(WARM):
            step.both()
        torch.cuda.synchronize()
        began = time.perf_counter()
        step.both()
        host_ms = 1e3 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    why = waits(step.both) if graphs else ""
    if graphs and not why:
        return captured(step, differentiates)
    return plain(step, f"backlog: {why}"[:80].rstrip(": "), host_ms, differentiates)


def captured(step: Contender, differentiates: bool) -> dict[str, Turn]:
    """A graph for each direction; that of the backward pass reads the tensors of a replay of the forward pass."""
    with side_stream():
        forward, outputs = capture(step.forward)
        if not differentiates:
            return {"forward": Turn(forward.replay, "graph")}
        backward, _ = capture(lambda: step.backward(outputs), forward.pool())
        both, _ = capture(step.both)
    return {
        "forward": Turn(forward.replay, "graph"),
        "backward": Turn(backward.replay, "graph", forward.replay),
        "both": Turn(both.replay, "graph"),
    }


def plain(step: Contender, how: str, host_ms: float, differentiates: bool) -> dict[str, Turn]:
    """Turns of the steps without graphs."""
    kept: list[Any] = []
    turns = {"forward": Turn(step.forward, how, None, host_ms)}
    if differentiates:
        before = lambda: kept.append(step.forward())  # noqa: E731
        turns["backward"] = Turn(lambda: step.backward(kept.pop()), how, before, host_ms)
        turns["both"] = Turn(step.both, how, None, host_ms)
    return turns


def milliseconds(turn: Turn, flush: Flush) -> float:
    """The time of one run."""
    if turn.before:
        turn.before()
    if flush.buffer is None:
        began = time.perf_counter()
        turn.run()
        return 1e3 * (time.perf_counter() - began)
    # More than the host's time requires, because it varies, and the launch of a graph takes time too.
    flush(2 + math.ceil(turn.host_ms / flush.milliseconds))
    start = event()
    turn.run()
    stop = event()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(turns: dict[Hashable, Turn], flush: Flush, rounds: int, seconds: float) -> dict[Hashable, Measured]:
    """Times of all turns, interleaved by rounds, within about `seconds`. Turns that run out of memory are left out."""
    times: dict[Hashable, list[float]] = {key: [] for key in turns}
    began = time.perf_counter()
    for number in range(rounds):
        for key in list(times):
            try:
                times[key].append(milliseconds(turns[key], flush))
            except torch.cuda.OutOfMemoryError:
                del times[key]
        if number + 1 >= FEWEST and time.perf_counter() - began > seconds * (number + 1) / (number + 2):
            break
    return {key: Measured(*quartiles(values), turns[key].how) for key, values in times.items()}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))
