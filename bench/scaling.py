"""Steps per second, bytes sent and memory of a training step on 1 to 4 processes: `python -m bench.scaling`.

It runs the loop of `fastkl train` under torchrun, over gloo on this machine's CPUs, and prints a table. The processes
share the cores and each has a batch of its own. The times are therefore those of this machine, not of a cluster; bytes
and memory are the same everywhere. The bytes sent are those that a process writes to its sockets, as Linux counts
them, beside the formulas of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastkl.vae import data, loop, parallel, run
from fastkl.vae.objective import Weights
from fastkl.vae.rules import resolve

COLUMNS = ("parallel", "processes", "parameters", "steps/s", "data/s", "sent", "formula", "state", "whole state")


def sent() -> int:
    """Bytes that this process has written, to files and sockets."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("wchar")))


def state_of(trained: run.Run) -> int:
    """Bytes of this process's weights, gradients and moments of AdamW."""
    parameters = [parallel.local(parameter) for parameter in trained.objective.parameters()]
    return 4 * sum(parameter.nbytes for parameter in parameters)


def formula(parameters: int, processes: int, mode: str) -> float:
    """Bytes that each process sends in a step in float32; gloo's reduce-scatter sends as much as its all-reduce."""
    ring = (processes - 1) / processes * 4 * parameters
    return 2 * ring if mode == "ddp" else 4 * ring


def worker(mode: str, hidden: int, batch: int, steps: int) -> None:
    ranks = parallel.start()
    try:
        torch.set_num_threads(1)
        given = {"hidden": hidden, "batch_size": batch, "parallel": mode, "steps": steps + 2, "device": "cpu"}
        settings = resolve(given)
        trained = run.start(settings, data.load(settings), ranks, Path("unused"))
        weights = Weights(*(torch.ones(()) for _ in Weights._fields))
        for step in range(steps + 2):
            if step == 2:  # the first steps make buffers
                began, before = time.perf_counter(), sent()
            for optimizer in trained.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            loss, *_ = loop.backward(trained, weights)
            loop.update(trained, loss)
            trained.step += 1
        bytes_sent, seconds = (sent() - before) / steps, time.perf_counter() - began
        parameters = sum(parameter.numel() for parameter in trained.objective.parameters())
        if ranks.main:
            row = (mode, ranks.size, parameters, steps / seconds, batch * ranks.size * steps / seconds, bytes_sent,
                   formula(parameters, ranks.size, mode), state_of(trained), 16 * parameters)  # fmt: skip
            print(json.dumps(dict(zip(COLUMNS, row))), flush=True)
    finally:
        parallel.stop(ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--hidden", type=int, default=2048, help="width of the layers of the MLP (default: 2048)")
    parser.add_argument("--batch-size", type=int, default=64, help="data per process (default: 64)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--worker", choices=("ddp", "fsdp"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.hidden, options.batch_size, options.steps)
        return
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    shared = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("hidden", "batch-size", "steps")]
    for mode in ("ddp", "fsdp"):
        for count in options.processes:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command = [*launcher, "-m", "bench.scaling", f"--worker={mode}", *shared]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            row = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
            print("| " + " | ".join(readable(name, value) for name, value in row.items()) + " |", flush=True)


def readable(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if name in ("sent", "formula", "state", "whole state"):
        return f"{value / 1e6:.2f} MB"
    return f"{value:.1f}" if name.endswith("/s") else f"{value:,}"


if __name__ == "__main__":
    main()
