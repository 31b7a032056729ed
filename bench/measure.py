"""The measurement of one case, from the check of every contender to the rows of the table."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bench import counting
from bench.budget import budget
from bench.budget import launches as own_launches
from bench.case import Case, as_list, backward, empty, make_cotangents, problem
from bench.timing import QUICK, Contender, Pace, Times, copy, heap_of, limit, measure, ratio, spread, threads

COMPILE, COPY, LIMIT = "torch.compile", "copy", "limit"
LARGE = 1 << 24  # from this many elements of an input on, further contenders run with the most threads only


def rows_of(
    op: str, case: Case, device: str, thread_counts: list[int], pace: Pace, host: bool, compile: bool = True,
    accounts: dict[int, dict[str, int] | None] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """(a row for each contender and number of threads, a line for each contender that does not match the definition).

    `host` also measures the step on empty data, `compile` also torch.compile of the eager formula. `accounts` has
    Inductor's account of its cached graphs by number of threads.
    """
    rows, wrong, counted, accounts = [], [], {}, accounts or {}
    for count in sorted(thread_counts, reverse=True):  # bytes and launches are counted with the most threads
        with threads(count):
            first = count == max(thread_counts)
            if first:
                functions, notes, yardsticks, cotangents = prepare(case, device, counted, compile, accounts.get(count))
                wrong = [f"{name}: {note}" for name, note in notes.items() if name != COMPILE or "differ" in note]
            elif COMPILE in functions:  # its code depends on the number of threads
                known = accounts.get(count)
                functions[COMPILE], notes[COMPILE] = compiled(case, case.inputs, cotangents, {}, account=known)
                functions = {name: function for name, function in functions.items() if function is not None}
            if not first and max(x.numel() for x in case.inputs) >= LARGE:
                functions = {name: function for name, function in functions.items() if name not in case.others}
            steps = {name: contender(function, case.inputs, cotangents) for name, function in functions.items()}
            with heap_of(steps.get("eager"), device):
                times = measure({**steps, **yardsticks}, device, pace)
            idle = host_times(case, functions, device, case.headline) if host and first else {}
        facts = {"op": op, "case": case.name, "threads": count if device == "cpu" else ""}
        for name in [*functions, *yardsticks]:
            row = {**facts, "provider": name, **timed(times[name]), **counted.get(name, {})}
            if "eager" in times:
                row |= named("speed_up", ratio(times["eager"], times[name]))
            if COPY in times:
                row["percent_of_copy"] = 100 * ratio(times[COPY], times[name]).median
                row["gigabytes_per_second"] = counted[COPY]["bytes_total"] / spread(times[name].both).median / 1e9
            row["host_us"] = 1e6 * idle[name] if name in idle else ""
            rows.append(row)
        rows += [{**facts, "provider": name, "note": note} for name, note in notes.items() if name not in functions]
    torch._dynamo.reset()
    return [{key: value for key, value in row.items() if key != "bytes_total"} for row in rows], wrong


def prepare(case: Case, device: str, counted: dict[str, dict], compile: bool, account: dict[str, int] | None) -> tuple:
    """Check and count each contender: (functions to time, reasons against the others, yardsticks, cotangents)."""
    outputs = as_list(case.eager(*case.inputs))
    cotangents = make_cotangents(outputs, case.inputs)
    functions, notes, known = {}, {}, {}
    for name, function in case.functions.items():
        if note := problem(case, name, function, cotangents, known):
            notes[name] = note
        else:
            functions[name] = function
            counted[name] = count(name, function, case.inputs, cotangents, device)
    if compile and "eager" in functions:
        function, note = compiled(case, case.inputs, cotangents, counted, account=account)
        note = note or problem(case, COMPILE, function, cotangents, known)
        if note:
            notes[COMPILE] = note
        else:
            functions[COMPILE] = function
            step = contender(function, case.inputs, cotangents)
            counted[COMPILE] |= kept(function, case.inputs, step.both, device)
    yardsticks = {LIMIT: limit(outputs, case.inputs)}
    if case.budget:
        own = budget(case.budget, case.inputs, outputs, cotangents)
        yardsticks[COPY] = copy(own, device)
        moved = {"bytes_forward": own.forward, "bytes_backward": own.backward}
        launches = dict(zip(("launches_forward", "launches_backward"), own_launches(case.budget, outputs)))
        counted["fastkl"] = {**launches, **counted.get("fastkl", {}), **moved}  # on a GPU, launches were counted
        counted[COPY] = {**moved, "bytes_total": own.both}
    for moved in counted.values():
        moved["latent_bytes"] = max(x.numel() * x.element_size() for x in case.inputs)
    return functions, notes, yardsticks, cotangents


def contender(function: Callable, inputs: list[Tensor], cotangents: list[Tensor]) -> Contender:
    """The step to time; without inputs that require a gradient its backward pass is empty."""
    return Contender(functools.partial(function, *inputs), lambda outputs: backward(inputs, outputs, cotangents))


def count(name: str, function: Callable, inputs: list[Tensor], cotangents: list[Tensor], device: str) -> dict:
    """Memory, and the traffic of formulas in torch ops; the traffic of fastkl's kernels comes from budget.py."""
    step = contender(function, inputs, cotangents)
    if name != "fastkl":
        moved: list[counting.Traffic] = []  # one step gives traffic and peak, because a large step takes seconds
        counts = kept(function, inputs, lambda: moved.extend(counting.count_eager(*step)), device)
        counts |= {"bytes_forward": moved[0].bytes, "bytes_backward": moved[1].bytes}
        counts |= {"launches_forward": moved[0].launches, "launches_backward": moved[1].launches}
        return counts
    counts = kept(function, inputs, step.both, device)
    if device == "cuda":
        step.both()
        counts["launches_forward"] = counting.gpu_launches(step.forward)
        both = counting.gpu_launches(step.both)
        counts["launches_backward"] = both - counts["launches_forward"]
    return counts


def kept(function: Callable, inputs: list[Tensor], step: Callable[[], Any], device: str) -> dict[str, int]:
    """Peak and saved bytes of a step that has run before."""
    return {"peak_bytes": counting.peak_bytes(step, device), "saved_bytes": counting.saved_bytes(function, inputs)}


def compiled(
    case: Case, inputs: list[Tensor], cotangents: list[Tensor] | None, counted: dict[str, dict],
    cached: bool = False, account: dict[str, int] | None = None,
) -> tuple[Callable | None, str]:  # fmt: skip
    """(torch.compile of the eager formula, ""), or (None, the reason); adds Inductor's account to `counted`.

    Cotangents of None are made for the outputs. `cached` lets Inductor use its cache; `account` is its account of
    graphs that are already in the cache.
    """
    torch._dynamo.reset()
    function = torch.compile(case.eager, dynamic=False)
    try:
        recording = counting.inductor_account(cached) if account is None else nullcontext(counting.Graphs([], []))
        with warnings.catch_warnings(), recording as graphs:
            warnings.simplefilter("ignore")
            outputs = function(*inputs)
            forward = counting.Graphs(list(graphs.bytes), list(graphs.launches)).total()
            backward(inputs, outputs, cotangents or make_cotangents(as_list(outputs), inputs))
            both = graphs.total()
    except Exception as error:  # a failure of the compiler leaves the other columns valid
        missing = re.search("InvalidCxxCompiler|Failed to find C compiler|No working C", str(error))
        return None, "no compiler" if missing else f"failed: {type(error).__name__}"
    if account is None:
        if not forward.launches:
            return None, "no graph was compiled"
        # Backward: all graphs without those of forward. With one forward graph, its backward is compiled with it.
        account = {"bytes_forward": forward.bytes, "bytes_backward": both.bytes - forward.bytes}
        account |= {"launches_forward": forward.launches, "launches_backward": both.launches - forward.launches}
    counted[COMPILE] = dict(account)
    return function, ""


def host_times(case: Case, functions: dict[str, Callable], device: str, compile: bool) -> dict[str, float]:
    """Seconds of the host's time per step. On a CPU the data are empty, and torch.compile compiles for them. On a GPU
    the data are full, because empty data launch no kernels; the host does not wait for the launched kernels."""
    waits, steps = device != "cuda", {}
    inputs = empty(case.inputs) if waits else case.inputs
    for name, function in functions.items():
        if name == COMPILE and not compile:
            continue
        try:
            if name == COMPILE and waits:
                torch._dynamo.reset()
                function = torch.compile(case.eager, dynamic=False)
            outputs = as_list(function(*inputs))
            step = contender(function, inputs, make_cotangents(outputs, inputs))
            step.both()
            steps[name] = step
        except Exception:  # some distances raise for empty samples
            continue
    seconds = {name: spread(times.both).median for name, times in measure(steps, "cpu", QUICK).items()}
    if not waits:
        torch.cuda.synchronize()
    return seconds


def named(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return {f"{name}_low": values[0], name: values[1], f"{name}_high": values[2]}


def timed(times: Times) -> dict[str, Any]:
    columns: dict[str, Any] = {"rounds": len(times.forward)}
    for part in ("forward", "backward", "both"):
        columns |= named(f"{part}_ms", spread([1e3 * value for value in getattr(times, part)]))
    return columns
