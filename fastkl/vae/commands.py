"""The commands that use the model of a run: `fastkl encode`, `decode`, `sample`, `reconstruct`, `evaluate`,
`export`, `report`.

Arrays are read and written in blocks of rows, so a .npy file may be larger than the memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastkl.vae import checkpoint, data, folders, parallel, rules, trained
from fastkl.vae.data import files
from fastkl.vae.errors import UserError
from fastkl.vae.evaluate import evaluate as figures_of
from fastkl.vae.export import FORMATS
from fastkl.vae.progress import say
from fastkl.vae.run import Run, choose_device, start
from fastkl.vae.state import restore
from fastkl.vae.trained import Trained

ROWS = 2**22  # numbers in a block of rows
COMMANDS = {
    "encode": "write the posterior means of data",
    "decode": "decode latents and write the data",
    "sample": "write decoded samples from the prior",
    "reconstruct": "write the reconstructions of data",
    "evaluate": "print ELBO, KL and log p(x) of held-out data as JSON",
    "export": "write encoder and decoder as programs that run without fastkl",
    "report": "write the report of a run again",
}
READS = {
    "encode": ("DATA", "a .npy, .npz or .pt file, or a folder of images, in the units of the training data"),
    "decode": ("LATENTS", "a .npy file of latents [N, ...]"),
    "reconstruct": ("DATA", "a .npy, .npz or .pt file, or a folder of images, in the units of the training data"),
}


def add_parsers(commands: Any) -> None:
    """Add the parser of each command, with the function of the same name below."""
    for name, about in COMMANDS.items():
        own = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        own.set_defaults(command=globals()[name])
        own.add_argument("run", metavar="RUN", type=Path, help="the folder of the run, such as runs/digits")
        if name in READS:
            metavar, text = READS[name]
            own.add_argument("data", metavar=metavar, type=Path, help=text)
        if name in (*READS, "sample"):
            own.add_argument("--out", metavar="PATH", type=Path, required=True, help="the .npy file to write, float32")
        if name == "sample":
            own.add_argument("--count", metavar="N", type=int, default=64, help="number of samples (default: 64)")
            own.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the samples (default: 0)")
        if name == "export":
            own.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder of the programs")
            text = "pt2, for torch.export.load (the default), or onnx"
            own.add_argument("--format", choices=FORMATS, default="pt2", help=text)
        if name == "evaluate":
            own.add_argument("--data", metavar="PATH", help="data to evaluate (default: the test data of the run)")
            text = "samples per datum for log p(x) (default: as many as in the run)"
            own.add_argument("--importance-samples", metavar="N", type=int, help=text)
        if name not in ("report", "export"):
            own.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to use (default: cpu)")


def loaded(options: argparse.Namespace) -> Trained:
    return trained.load(options.run, device=choose_device(options.device, parallel.Ranks()))


def encode(options: argparse.Namespace) -> int:
    model = loaded(options)
    return write(model.encode, rows_of(options.data, model), options.out, f"DATA {options.data}")


def reconstruct(options: argparse.Namespace) -> int:
    model = loaded(options)
    return write(model.reconstruct, rows_of(options.data, model), options.out, f"DATA {options.data}")


def decode(options: argparse.Namespace) -> int:
    model = loaded(options)
    if options.data.suffix != ".npy":
        raise UserError(f"LATENTS {options.data}: expected a .npy file, such as `fastkl encode` writes")
    return write(model.decode, rows_of(options.data, model, "LATENTS"), options.out, f"LATENTS {options.data}")


def sample(options: argparse.Namespace) -> int:
    if options.count < 1:
        raise UserError(f"--count must be at least 1, got {options.count}")
    model = loaded(options)
    model.seed_decoder(options.seed)
    latents = model.latents(options.count, seed=options.seed).numpy()
    return write(model.decode, latents, options.out, "the latents", model.decoded_at_once)


def export(options: argparse.Namespace) -> int:
    for line in trained.load(options.run).export(options.out, format=options.format):
        say(line)
    say(f"{options.out}: {', '.join(sorted(path.name for path in options.out.glob(f'*.{options.format}')))}")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    model = loaded(options)
    if options.data is None:
        source = data.load(model.settings)
        x, labels = source.test, source.test_labels
    else:
        x, labels = model.scaled(whole(Path(options.data), model)[:]), None
    samples = options.importance_samples or model.settings.importance_samples
    if samples < 1:
        raise UserError(f"--importance-samples must be at least 1, got {samples}")
    found = figures_of(model.vae, x, samples, model.settings.seed, model.device, model.prior, labels, model.scaling)
    print(json.dumps(found.figures(), indent=2))
    return 0


def report(options: argparse.Namespace) -> int:
    """Evaluate the model of a checkpoint on one process, and write the report again."""
    claim = folders.claim_old(options.run, "")
    try:
        state = checkpoint.load(claim.folder)
        settings = rules.resume(state["settings"], {})
        run = start(dataclasses.replace(settings, device="auto"), data.load(settings), parallel.Ranks(), claim.folder)
        restore(run, {**state, "ranks": 1})
        with run.reported():
            write_report_of(run, time.perf_counter())
    finally:
        claim.release()
    return 0


def rows_of(path: Path, model: Trained, option: str = "DATA") -> np.ndarray:
    """The rows of a file or folder. Those of a .npy file are read when they are used."""
    values = files.mapped(path, option) if path.suffix.lower() == ".npy" else whole(path, model)
    if values.ndim < 2 or not len(values):
        raise UserError(f"{option} {path}: expected at least one row [N, ...], got shape {list(values.shape)}")
    return values


def whole(path: Path, model: Trained) -> np.ndarray:
    """The data of a file or folder, read in the same way as the run's own."""
    settings = dataclasses.replace(model.settings, stream=model.settings.stream and path.is_dir())
    parts = files.read(path, settings, "DATA").parts
    return next(iter(parts.values())).values


def write(
    function: Callable[[np.ndarray], Tensor], rows: np.ndarray, path: Path, where: str, at_once: int = 0
) -> int:  # fmt: skip
    """Write function(rows) to a .npy file, in blocks of `at_once` rows. The file gets its name when it is complete.
    `where` names the rows in errors."""
    if path.suffix != ".npy":
        raise UserError(f"--out {path}: the name must end in .npy")
    temporary, shape = path.with_name(f".{path.name}.tmp"), [0]
    size = at_once or max(1, ROWS // math.prod(rows.shape[1:]))
    try:
        # Not a memory map: on a full disk the system would end the process.
        with open(temporary, "wb") as stream:
            for first in range(0, len(rows), size):
                block = np.array(rows[first : first + size])
                try:
                    values = function(block).numpy().astype("<f4", order="C", copy=False)
                except UserError as error:  # it counts the rows of its block
                    of = f", of rows {first} to {first + len(block) - 1}" if len(block) < len(rows) else ""
                    raise UserError(f"{where}{of}: {error}") from None
                if first == 0:
                    shape = [len(rows), *values.shape[1:]]
                    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(values.data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {checkpoint.reason(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)
    say(f"{path}: {len(rows):,} rows of shape {shape[1:]}")
    return 0


def write_report_of(run: Run, began: float) -> None:
    """Evaluate the run, write its report and print the figures."""
    # Imported here, so that a run without a report does not need matplotlib.
    from fastkl.vae import memory
    from fastkl.vae.report import summary, write_report

    asked = (run.settings.importance_samples, run.settings.seed, run.device, run.prior, run.data.test_labels)
    evaluation = figures_of(run.vae, run.data.test, *asked, run.data.scaling)
    costs = memory.shares(run)
    say(costs["what"])
    for name, cells in memory.table(costs):
        say(f"  {name:11} kept {cells[0]:>18}   peak {cells[1]:>18}   {cells[2]:>18}")
    metrics = write_report(run, evaluation, {"loss_share": costs})
    for name, value, text in summary(metrics):
        say(f"  {name:19} {value:>18}  {text}")
    say(f"{time.perf_counter() - began:.1f} s; report: {run.folder / 'report.html'}")
