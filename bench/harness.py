"""Time every op against the eager formula and torch.compile of the same formula, forward and backward.

    python bench/harness.py [OP ...] [--quick] [--csv FILE]

Each bench_<op>.py beside this file defines `cases(device, quick)`, which yields `Case`s. Results are compared first:
what does not agree is not timed, and the exit status is 1. The contenders then take turns for a number of rounds, so
that a machine that changes its speed changes it for all of them; medians are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = None

HERE = Path(__file__).parent
CONTENDERS = ("eager", "compile", "fastkl")
# Results agree where they differ by at most this many units in the last place of the coarsest dtype involved, relative
# to the largest value: the eager formulas are naive, and their rounding is not what is measured here.
UNITS = 64


class Case(NamedTuple):
    """One op at one size. Both functions take the inputs and return a tensor or a tuple of tensors."""

    name: str
    inputs: list[Tensor]
    eager: Callable
    fastkl: Callable
    # What to compare in place of `eager` and `fastkl`, where those draw noise of their own.
    same_noise: tuple[Callable, Callable] | None = None


def leaves(device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Standard normal inputs that want a gradient, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def run(function: Callable, inputs: list[Tensor], cotangents: list[Tensor] | None = None):
    """(outputs, gradients) of one forward and backward pass; no gradients where no input wants one."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if not any(tensor.requires_grad for tensor in inputs):
        return outputs, ()
    return outputs, torch.autograd.grad(outputs, inputs, cotangents or make_cotangents(outputs, inputs))


def make_cotangents(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """A small output is a loss: its gradient comes from `.mean()`, with stride 0. A large one goes on to a decoder."""
    generator, largest = torch.Generator().manual_seed(1), max(tensor.numel() for tensor in inputs)
    small = [out.new_tensor(1 / max(1, out.numel())).expand(out.shape) for out in outputs]
    large = [torch.randn(out.shape, generator=generator).to(out) if out.numel() >= largest else None for out in outputs]
    return [s if x is None else x for s, x in zip(small, large)]


def disagreement(actual, expected) -> str:
    """Empty where two results of `run` agree."""
    for kind, got, wanted in zip(("output", "gradient"), actual, expected):
        for index, (a, b) in enumerate(zip(got, wanted)):
            if a.shape != b.shape:
                return f"{kind} {index} has shape {tuple(a.shape)}, expected {tuple(b.shape)}"
            coarsest = max(torch.finfo(tensor.dtype).eps for tensor in (a, b, *wanted))
            scale = b.double().abs().max().item() if b.numel() else 0.0
            error = (a.double() - b.double()).abs().max().item() if b.numel() else 0.0
            if not error <= UNITS * coarsest * scale:  # NaN does not agree either
                return f"{kind} {index} differs by {error:.2e}, largest value {scale:.2e}"
    return ""


def saved_bytes(function: Callable, inputs: list[Tensor]) -> int:
    """What the forward pass keeps for the backward pass, beyond its inputs; each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, tuple[int, Tensor]] = {}  # holds on to the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(size for size, _ in kept.values())


def seconds(step: Callable[[], object], repeats: int, device: str) -> float:
    """Per step: by CUDA events on a GPU, by the wall clock elsewhere."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    if device == "cuda":
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    return (time.perf_counter() - begin) / repeats


def compiled(case: Case) -> tuple[Callable | None, str]:
    """torch.compile of the eager formula, or None and why there is none."""
    torch._dynamo.reset()
    function = torch.compile(case.eager, dynamic=False)
    try:
        run(function, case.inputs)
    except Exception as error:  # whatever goes wrong inside the compiler, the other columns stand
        missing = any(words in str(error) for words in ("InvalidCxxCompiler", "Failed to find C compiler"))
        return None, "no compiler" if missing else f"failed: {type(error).__name__}"
    return function, ""


def measure(case: Case, device: str, rounds: int, round_seconds: float) -> dict:
    """Milliseconds and saved bytes of each contender. Raises ValueError where the results do not agree."""
    expected, actual = (run(f, case.inputs) for f in case.same_noise or (case.eager, case.fastkl))
    if problem := disagreement(actual, expected):
        raise ValueError(f"fastkl and the eager formula do not agree: {problem}")
    function, why_not = compiled(case)
    if function and not case.same_noise and disagreement(run(function, case.inputs), expected):
        function, why_not = None, "wrong result"

    cotangents = make_cotangents(expected[0], case.inputs)
    row, steps, times = {"why_not": why_not}, {}, {}
    for name, f in zip(CONTENDERS, (case.eager, function, case.fastkl)):
        if f is not None:
            row[f"{name}_saved"] = saved_bytes(f, case.inputs)
            step = functools.partial(run, f, case.inputs, cotangents)
            once = min(seconds(step, 1, device) for _ in range(3))
            steps[name], times[name] = (step, max(1, math.ceil(round_seconds / once))), []
    for _ in range(rounds):
        for name, (step, repeats) in steps.items():
            times[name].append(seconds(step, repeats, device))
    return row | {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}


def busy(text: str) -> contextlib.AbstractContextManager:
    """Says what is being measured: a spinner on a terminal, a line elsewhere."""
    if Console is not None and sys.stderr.isatty():
        return Console(stderr=True).status(text)
    print(text, file=sys.stderr, flush=True)
    return contextlib.nullcontext()


def show(records: list[dict], title: str) -> None:
    header = ["op", "case", *(f"{name} ms" for name in CONTENDERS), "eager / fastkl", "compile / fastkl"]
    header += [f"{name} saves" for name in CONTENDERS]
    rows = []
    for r in records:
        ms = [f"{r[f'{name}_ms']:.3f}" if f"{name}_ms" in r else r["why_not"] for name in CONTENDERS]
        ratios = [f"{r[f'{name}_ms'] / r['fastkl_ms']:.2f}x" if f"{name}_ms" in r else "-" for name in CONTENDERS[:2]]
        saved = [f"{r[f'{name}_saved'] / 2**20:.2f} MiB" if f"{name}_saved" in r else "-" for name in CONTENDERS]
        rows.append([r["op"], r["case"], *ms, *ratios, *saved])
    if Console is None:
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        print(title, *("  ".join(map(str.ljust, row, widths)) for row in (header, *rows)), sep="\n")
        return
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Benchmark fastkl against eager PyTorch and torch.compile.")
    parser.add_argument("op", nargs="*", help="ops to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--csv", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    if unknown := set(options.op) - set(known):
        parser.error(f"unknown op {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, no kernels"
    rounds, round_seconds = (5, 0.01) if options.quick else (15, 0.1)
    records, failures = [], []
    for op in options.op or known:
        for case in importlib.import_module(f"bench_{op}").cases(device, options.quick):
            try:
                with busy(f"{op} {case.name} ..."):
                    result = measure(case, device, rounds, round_seconds)
            except ValueError as error:
                failures.append(f"{op} {case.name}: {error}")
                continue
            records.append({"op": op, "case": case.name, "device": what, "torch": torch.__version__, **result})
    show(records, f"forward + backward, {what}, torch {torch.__version__}")
    if options.csv and records:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
            writer.writeheader()
            writer.writerows(records)
    for failure in failures:
        print(f"NOT TIMED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.modules["harness"] = sys.modules[__name__]  # bench files import it by name
    sys.exit(main())
