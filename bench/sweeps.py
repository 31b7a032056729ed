"""Sweeps: time as a function of one size, from a single element to millions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import bench_gmm_log_prob, bench_kl_normal, bench_rsample_kl
from bench.case import Case, as_list, make_cotangents, problem
from bench.measure import LIMIT, contender, named
from bench.timing import Pace, heap_of, limit, measure, spread, threads

STEP = 4
CHECKED = 1 << 18  # the most elements of an input for a full check in float64
PACE = Pace(5, 0.01, 1.5)


class Sweep(NamedTuple):
    """A sweep: `make(device, x)` is the case at size x, which has `elements` elements per unit of x."""

    name: str
    axis: str
    largest: int
    elements: int
    make: Callable[[str, int], Case]

    def sizes(self, quick: bool) -> Iterator[int]:
        size, last = 1, self.largest // (64 if quick else 1)
        while size <= last:
            yield size
            size *= STEP if not quick else STEP * STEP


# Rows of 16 are a usual latent of a small VAE. With 32 data the largest mixture's broadcast temporary has 134 MB.
SWEEPS = {
    sweep.name: sweep
    for sweep in (
        Sweep("KL, N = 1", "D", 1 << 24, 1, lambda device, x: bench_kl_normal.plain(device, 1, x)),
        Sweep("KL, D = 16", "N", 1 << 20, 16, lambda device, x: bench_kl_normal.plain(device, x, 16)),
        Sweep("sample + KL, N = 1", "D", 1 << 24, 1, lambda device, x: bench_rsample_kl.plain(device, 1, x)),
        Sweep("sample + KL, D = 16", "N", 1 << 20, 16, lambda device, x: bench_rsample_kl.plain(device, x, 16)),
        Sweep("mixture log-density, N = 32, D = 16", "K", 1 << 16, 32 * 16, lambda device, x: mixture(device, x)),
    )
}


def mixture(device: str, components: int) -> Case:
    inputs = bench_gmm_log_prob.inputs(device, 32, components, 16)
    return next(bench_gmm_log_prob.cases(device, True))._replace(inputs=inputs)


def rows_of(sweep: Sweep, size: int, device: str, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for eager, fastkl and the limit, a line for each contender that does not match the definition)."""
    case = sweep.make(device, size)
    with threads(count):
        outputs = as_list(case.eager(*case.inputs))
        cotangents = make_cotangents(outputs, case.inputs)
        functions = {"eager": case.eager, "fastkl": case.fastkl}
        notes = {name: refused(case, name, function, cotangents) for name, function in functions.items()}
        steps = {n: contender(f, case.inputs, cotangents) for n, f in functions.items() if not notes[n]}
        with heap_of(steps.get("eager"), device):
            times = measure({**steps, LIMIT: limit(outputs, case.inputs)}, device, PACE)
    facts = {"op": sweep.name, "case": f"{sweep.axis} = {size}", "axis": sweep.axis, "x": size, "threads": count}
    rows = []
    for name, found in times.items():
        both = spread(found.both)
        row = {**facts, "provider": name, **named("both_ms", spread([1e3 * value for value in found.both]))}
        rows.append({**row, "ns_per_element": 1e9 * both.median / (size * sweep.elements), "rounds": len(found.both)})
    return rows, [f"{name}: {note}" for name, note in notes.items() if note]


def refused(case: Case, name: str, function: Callable, cotangents: list[Tensor]) -> str:
    """The reason why a contender may not be timed, or "". Large sizes are checked by their KL only, in float32, because
    the table of sizes checks large sizes fully."""
    if max(x.numel() for x in case.inputs) <= CHECKED:
        return problem(case, name, function, cotangents)
    actual, expected = (as_list(f(*case.inputs))[-1].double() for f in (function, case.eager))
    return "" if torch.allclose(actual, expected, rtol=1e-3) else f"expected {expected}, got {actual}"


class Growth(NamedTuple):
    """Growth of time between neighbouring sizes: time per element over that of the size before; 1 is linear."""

    worst: float  # the largest growth above the overhead; at the end of a cache it is above 1 for every op
    worst_at: int
    beyond_cache: float  # the largest growth with both sizes beyond the cache, where it should be 1

    @property
    def verdict(self) -> str:
        return "linear" if max(self.worst / STEP, self.beyond_cache / 1.5) <= 1 else f"cliff at {self.worst_at}"


def growth(points: list[tuple[int, float]], bytes_per_x: float, cache: int) -> Growth:
    """The growth of (x, seconds), in the order of x. Points below four times the least time are overhead."""
    least = min(seconds for _, seconds in points)
    worst, at, beyond = 1.0, points[-1][0], 1.0
    for (x, seconds), (next_x, next_seconds) in itertools.pairwise(points):
        if seconds < 4 * least:
            continue
        ratio = (next_seconds / seconds) / (next_x / x)
        if ratio > worst:
            worst, at = ratio, next_x
        if x * bytes_per_x > cache:
            beyond = max(beyond, ratio)
    return Growth(worst, at, beyond)


def growth_of(rows: list[dict[str, Any]], sweep: Sweep, provider: str, cache: int) -> Growth | None:
    """The growth of the time net of allocating and filling outputs and gradients: above 32 MiB glibc maps each block
    again at every step, and the page faults of that do not depend on the op."""
    own, least = (
        {row["x"]: row["both_ms"] for row in rows if (row["op"], row["provider"]) == (sweep.name, name)}
        for name in (provider, LIMIT)
    )
    points = [(x, max(0.1 * own[x], own[x] - least.get(x, 0.0))) for x in sorted(own)]
    # Bytes that a step touches at least: two inputs and their gradients.
    width = 4 * torch.float32.itemsize * (16 if sweep.axis == "K" else sweep.elements)
    return growth(points, width, cache) if len(points) > 1 else None
