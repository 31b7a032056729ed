"""The command line: `fastkl train`, `python -m fastkl.vae train`, `torchrun --nproc-per-node 2 -m fastkl.vae train`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from fastkl.vae.errors import UserError
from fastkl.vae.rules import defaults, flag, resolve, resume
from fastkl.vae.settings import Settings

RUNS = Path("runs")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 2 an error that the person can mend, 130 stopped on request."""
    options = parser().parse_args(arguments)
    try:
        return options.command(options)
    except UserError as error:
        print(f"fastkl: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("fastkl: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # whatever else a disk can do
        where = f" ({error.filename})" if error.filename else ""
        print(f"fastkl: {error.strerror or error}{where}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastkl", description="Train variational autoencoders through fastkl.")
    commands = top.add_subparsers(title="commands", required=True)
    about = "train the reference VAE and write a report"
    train = commands.add_parser("train", help=about, description=about, argument_default=argparse.SUPPRESS)
    train.set_defaults(command=train_command)
    train.add_argument("--out", type=Path, help=f"the run folder (default: {RUNS}/NAME, or the next free number)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, or the latest of its name")
    train.add_argument("--no-report", action="store_true", help="stop after training")
    train.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard events")
    for item in dataclasses.fields(Settings):
        meta = item.metadata
        text = f"{meta['help']} (default: {item.default})".replace("%", "%%")
        train.add_argument(flag(item.name), type=meta["kind"], choices=meta["choices"], help=text)
    return top


def train_command(options: argparse.Namespace) -> int:
    # Imported here and below, so that a mistyped option or a missing package is reported before the rest is loaded.
    from fastkl.vae import parallel

    began = time.perf_counter()
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(Settings) if item.name in options}
    ranks = parallel.start()
    try:
        return train_on(ranks, options, given, began)
    except UserError:
        if ranks.main:
            raise
        return 2  # the main process says it, once
    finally:
        parallel.stop(ranks)


def train_on(ranks: Any, options: argparse.Namespace, given: dict[str, Any], began: float) -> int:
    import torch

    from fastkl.vae import checkpoint, data, train
    from fastkl.vae.progress import Display, Terminal

    say = print if ranks.main else (lambda *text: None)
    folder = state = None
    if ranks.main:  # the only one that touches the run folder
        folder = choose_folder(getattr(options, "out", None), "resume" in options, defaults(given).name)
        if "resume" in options and (folder / checkpoint.NAME).exists():
            state = checkpoint.load(folder)
    folder, state = ranks.broadcast((folder, state))
    settings = resume(state["settings"], given) if state else resolve(given)
    if threads := settings.threads or (state or {}).get("threads", 0):
        torch.set_num_threads(threads)  # another number of threads would round sums differently
    source = data.load(settings)
    run = train.start(settings, source, ranks, folder)
    if state:
        train.restore(run, state)
        say(f"{folder}: going on at step {run.step} of {run.total_steps}")
    else:
        note = "no checkpoint there yet, " if "resume" in options else ""
        count = f"{len(source.train):,} training data, {run.total_steps:,} steps"
        say(f"{folder}: {note}{settings.preset} on {source.name}, {count}")
    if ranks.main:
        checkpoint.prepare(folder)
    events = None if "no_tensorboard" in options else folder / "tensorboard"
    if run.step < run.total_steps:
        with Terminal(run, events) if ranks.main else Display() as display:
            finished = train.train(run, display)
        if not finished:
            say(f"stopped at step {run.step}; go on with: fastkl train --resume --out {folder}")
            return 130
    if ranks.main and "no_report" not in options:
        report(run, began)
    return 0


def choose_folder(out: Path | None, resuming: bool, name: str) -> Path:
    """The folder asked for; else runs/NAME, runs/NAME-2, ...: the latest to resume, the first free one to start."""
    from fastkl.vae.checkpoint import NAME

    if out is not None:
        if not resuming and (out / NAME).exists():
            raise UserError(f"--out {out} holds a run; go on with it by --resume, or choose another folder")
        return out
    numbered = [RUNS / name]
    while (numbered[-1] / NAME).exists():
        numbered.append(RUNS / f"{name}-{len(numbered) + 1}")
    return numbered[-2] if resuming and len(numbered) > 1 else numbered[-1]


def report(run: Any, began: float) -> None:
    from fastkl.vae import memory
    from fastkl.vae.evaluate import evaluate
    from fastkl.vae.report import summary, write_report

    asked = (run.settings.importance_samples, run.settings.seed, run.device, run.prior, run.data.test_labels)
    evaluation = evaluate(run.vae, run.data.test, *asked)
    more: dict[str, Any] = {}
    if run.settings.model == "conv":
        more["loss_memory"] = memory.compare(run.vae.latent_shape)
        print(more["loss_memory"]["what"])
        for name, row in more["loss_memory"]["rows"].items():
            print(f"  {name:8} kept {row['saved']:7.1f} MiB   peak {row['peak']:7.1f} MiB   {row['time']:7.1f} ms")
    metrics = write_report(run, evaluation, more)
    for name, value, text in summary(metrics):
        print(f"  {name:19} {value:>18}  {text}")
    print(f"{time.perf_counter() - began:.1f} s; report: {run.folder / 'report.html'}")
