"""Every op once on this device, forward and backward, against its closed form in float64 on the CPU.

    python -m bench.smoke --out smoke.jsonl --jobs 16 --seconds 100
    python -m bench.smoke --only rsample_kl           # the calls whose name contains it, in this process

Each call runs in float32 and bfloat16, four times, with bitwise equal results. On a GPU no call may synchronise with
the device, a step must be capturable in a CUDA graph whose replay follows new inputs, and a second GPU must give the
same result. Several processes share the calls; a process is restarted after a device error. A line for each call says
ok or FAIL; the exit status is 1 if one has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import device
from bench.smoke_cases import Call, calls
from fastkl.ops import _call

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Relative to the largest value. These bounds are loose; the tests check accuracy.
ALLOWED = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
CLASSES = {"hard", "sample_gmm"}  # discrete choices by noise, which rounding may change
STICKY = ("CUDA error", "device-side assert", "illegal memory access")  # errors that make a process unusable
CHECKED = ["kl_normal 37x37", "rsample_kl packed 37x37", "gumbel_softmax 37x37"]  # calls under compute-sanitizer
CHECKED += ["gmm_log_prob 300x50x20", "total_correlation 300x50x20", "mmd 300x50x20"]


def draw(call: Call, dtype: torch.dtype, seed: int, device: str) -> list[Tensor]:
    """Standard normal inputs, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in call.shapes]
    return [tensor.to(device).requires_grad_() for tensor in drawn]


def step(call: Call, inputs: list[Tensor], weights: list[Tensor] | None = None) -> list[Tensor]:
    """Outputs and gradients of a loss: the sum of the outputs, weighted by `weights` if given."""
    value = call.function(*inputs)
    outputs = [value] if isinstance(value, Tensor) else [out for out in value if out is not None]
    real = [number for number, out in enumerate(outputs) if out.requires_grad]
    if not real:
        return outputs
    incoming = [torch.ones_like(outputs[n]) if weights is None else weights[n].to(outputs[n]) for n in real]
    gradients = torch.autograd.grad([outputs[n] for n in real], inputs, incoming, allow_unused=True)
    return [*(out.detach() for out in outputs), *(gradient for gradient in gradients if gradient is not None)]


@contextlib.contextmanager
def cpu_by(implementations: dict[str, Callable]):
    """Use these implementations for CPU tensors."""
    before = dict(_call.CPU)
    _call.CPU.update(implementations)
    try:
        yield
    finally:
        _call.CPU.update(before)


def fill_free_memory() -> None:
    """Fill the allocator's free blocks with NaN, so that an output that is not written is noticed."""
    for size in (1 << 12, 1 << 16, 1 << 22):
        kept = [torch.full((size,), float("nan"), device=DEVICE) for _ in range(8)]
        del kept


def disagreement(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise AssertionError(
            f"shapes: expected {[tuple(x.shape) for x in expected]}, got {[tuple(x.shape) for x in found]}"
        )
    worst = 0.0
    for a, b in zip(found, expected):
        a, b = a.double().cpu(), b.double().cpu()
        if (a.isnan() & ~b.isnan()).any():
            raise AssertionError("NaN")
        if a.numel():
            worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item())
    return worst


def check(name: str, call: Call, dtype: torch.dtype) -> dict[str, Any]:
    """The result of one call; "wrong" lists its faults."""
    with cpu_by(_call.CLOSED_FORM):
        exact = [tensor.detach().double().requires_grad_() for tensor in draw(call, dtype, 0, "cpu")]
        outputs = call.function(*exact)
        outputs = [outputs] if isinstance(outputs, Tensor) else [out for out in outputs if out is not None]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.rand(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
        truth = step(call, exact, weights)
    inputs = draw(call, dtype, 0, DEVICE)
    fill_free_memory()
    began = time.perf_counter()
    found = step(call, inputs, weights)
    synchronize()
    first = time.perf_counter() - began
    wrong, error = [], disagreement(found, truth)
    if not error <= ALLOWED[dtype] and not CLASSES.intersection(name.split()):
        wrong.append(f"error {error:.1e}, allowed {ALLOWED[dtype]:.0e}")
    again = [step(call, inputs, weights) for _ in range(3)]
    if not all(torch.equal(a, b) for results in again for a, b in zip(results, found)):
        wrong.append("four calls differ")
    if CUDA and not call.waits:
        problem = device.waits(lambda: step(call, inputs)) or not_captured(call, dtype)
        wrong += [problem] * bool(problem)
    if CUDA and torch.cuda.device_count() > 1:
        moved = step(call, draw(call, dtype, 0, "cuda:1"), weights)
        if not all(torch.equal(a, b.to(a.device)) for a, b in zip(found, moved)):
            wrong.append("another result on the second GPU")
    return {"error": error, "first_s": round(first, 2), "wrong": wrong}


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def not_captured(call: Call, dtype: torch.dtype) -> str:
    """The reason why a step cannot be captured in a CUDA graph or its replay is wrong, or ""."""
    inputs, others = draw(call, dtype, 0, DEVICE), draw(call, dtype, 1, DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(call, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = step(call, inputs)
        with torch.no_grad():
            for tensor, other in zip(inputs, others):
                tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return f"not captured: {error}".splitlines()[0]
    expected = step(call, others)
    return "" if all(map(torch.equal, captured, expected)) else "a graph's replay differs"


def attempt(name: str, call: Call, dtypes: list[torch.dtype]) -> tuple[dict[str, Any], bool]:
    """(the row of a call, whether this process can go on)."""
    row: dict[str, Any] = {"call": name, "device": torch.cuda.get_device_name() if CUDA else "CPU", "ok": True}
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        try:
            row[label] = check(name, call, dtype)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            row[label] = {"wrong": [what[:400]], "where": traceback.format_exc()[-1500:]}
            if any(mark in what for mark in STICKY):
                return row | {"ok": False}, False
        row["ok"] &= not row[label]["wrong"]
    return row, True


def line(row: dict[str, Any]) -> str:
    """The row as a line of text."""
    parts = [f"{'ok  ' if row['ok'] else 'FAIL'} {row['call']:<46}"]
    for label in ("float32", "bfloat16"):
        if found := row.get(label):
            parts.append(f"{label} {'; '.join(found['wrong']) or format(found['error'], '.1e')}")
    return "  ".join(parts)


def work(names: list[str], folder: Path, small: bool) -> int:
    """Run calls that no other process has taken, until all are taken."""
    every = calls(small)
    dtypes = [torch.float32] if small else [torch.float32, torch.bfloat16]
    for number, name in enumerate(names):
        try:
            (folder / f"{number}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        row, usable = attempt(name, every[name], dtypes)
        temporary = folder / f"{number}.part"
        temporary.write_text(json.dumps(row))
        temporary.rename(folder / f"{number}.json")
        if not usable:  # restart, because this process can no longer use the device
            os.execv(sys.executable, [sys.executable, "-m", "bench.smoke", *sys.argv[1:]])
    return 0


def lead(names: list[str], given: argparse.Namespace) -> int:
    """Start the processes, print a line for each finished call, and report calls that did not finish."""
    failed, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as place, given.out.open("w") as out:
        folder, seen = Path(place), set()
        command = [sys.executable, "-m", "bench.smoke", "--folder", place, "--only", given.only]
        command += ["--small"] * given.small + ["--interpreted"] * given.interpreted
        errors = (folder / "errors").open("w")
        workers = [subprocess.Popen(command, stderr=errors, stdout=errors) for _ in range(given.jobs)]
        try:
            while True:
                ended = all(worker.poll() is not None for worker in workers)
                late = time.monotonic() - began > given.seconds
                for path in sorted(set(folder.glob("*.json")) - seen):
                    seen.add(path)
                    row = json.loads(path.read_text())
                    failed += not row["ok"]
                    print(json.dumps(row), file=out, flush=True)
                    print(line(row), flush=True)
                if ended or late:
                    break
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.kill()
        for number, name in enumerate(names):
            if not (folder / f"{number}.json").exists():
                taken = (folder / f"{number}.taken").exists()
                why = "it did not end, or its process died" if taken else "no time left"
                print(f"FAIL {name:<46}  {why}", flush=True)
                failed += 1
        print((folder / "errors").read_text()[-3000:], end="", file=sys.stderr)
    print(f"{len(names) - failed} of {len(names)} calls ok", flush=True)
    return int(failed > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file with a JSON line for each call; runs several processes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--seconds", type=float, default=1e9, help="calls that have not ended by then have failed")
    parser.add_argument("--only", default="", help="run the calls whose name contains this text")
    parser.add_argument("--small", action="store_true", help="few and small sizes, float32 only")
    parser.add_argument("--interpreted", action="store_true", help="run the Triton kernels on CPU tensors")
    parser.add_argument(
        "--sanitized", action="store_true", help="run a few calls without checks, for compute-sanitizer"
    )
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # set by `lead` for its processes
    given = parser.parse_args(arguments)
    every = calls(given.small)
    names = [name for name in every if given.only in name]
    if given.interpreted:
        _call.CPU.update(_call.TRITON)
    if given.sanitized:
        for name in CHECKED:
            step(every[name], draw(every[name], torch.float32, 0, DEVICE))
        synchronize()
        return 0
    if given.folder:
        return work(names, given.folder, given.small)
    if given.out:
        return lead(names, given)
    rows = [attempt(name, every[name], [torch.float32, torch.bfloat16])[0] for name in names]
    print(*map(line, rows), sep="\n")
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
