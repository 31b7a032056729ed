"""The command line: `fastkl train`, `python -m fastkl.vae train`, `torchrun --nproc-per-node 2 -m fastkl.vae train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastkl
from fastkl.vae import autoencoder, checkpoint, data, facts, folders, loop, pace, parallel, pretrained
from fastkl.vae.commands import add_parsers, write_report_of
from fastkl.vae.config import read_config
from fastkl.vae.data.arrays import first_line
from fastkl.vae.errors import UserError, check_installed
from fastkl.vae.events import TensorBoard, WandB
from fastkl.vae.progress import Display, Terminal, say
from fastkl.vae.rules import defaults, flag, prolonging, resolve, resume
from fastkl.vae.run import NOTHING, Own, Run, start
from fastkl.vae.settings import AUTOENCODER, GROUPS, Settings
from fastkl.vae.state import restore

EXAMPLES = """examples:
  fastkl train                                          digits of 8 x 8 pixels, under a minute
  fastkl train --data mnist5k --prior gmm               with a mixture as the prior
  fastkl train --data pictures/ --image-size 64 --model conv
  fastkl train --data x.npz --test-data test.npz --validation 0.1 --out runs/mine
  fastkl train --resume --out runs/mine                 after Ctrl-C, a crash or a reboot, bit for bit
  torchrun --nproc-per-node 2 -m fastkl.vae train       on two processes
  torchrun --nproc-per-node 2 --max-restarts 9 -m fastkl.vae train --out runs/mine      starts again if one dies
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 for success, 2 for a user's error, 130 for a stop on request."""
    options = parser().parse_args(arguments)
    options.typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return options.command(options)
    except UserError as error:
        say(f"fastkl: {error}", error=True)
    except KeyboardInterrupt:
        say("fastkl: interrupted", error=True)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        less = "a smaller --batch-size, --image-size, --hidden or --latent needs less"
        say(f"fastkl: the memory is too small: {less} ({first_line(error)})", error=True)
    except OSError as error:  # an error of the disk that no other place handles
        where = f" ({error.filename})" if error.filename else ""
        say(f"fastkl: {error.strerror or error}{where}", error=True)
    return 2


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or torch found no memory. torch has a class of its own for that of a GPU only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. Options of training that are not given stay out of its result."""
    top = argparse.ArgumentParser(
        prog="fastkl", description="Train variational autoencoders with fastkl, and use them.",
        epilog="`fastkl COMMAND --help` lists the options of a command.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"fastkl {fastkl.__version__} (torch {torch.__version__})")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    about = "train the reference VAE and write a report"
    train = commands.add_parser(
        "train", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=EXAMPLES, add_help=False,
        argument_default=argparse.SUPPRESS, usage="%(prog)s [options]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30),
    )  # fmt: skip
    train.set_defaults(command=train_command)
    run = train.add_argument_group("the run")
    run.add_argument("-h", "--help", action="help", help="show this help and exit")
    run.add_argument(
        "--out", metavar="PATH", help=f"the run folder (default: {folders.RUNS}/NAME, {folders.RUNS}/NAME-2, ...)"
    )
    run.add_argument(
        "--resume", action="store_true",
        help="continue the run in --out; without --out, the latest one with the same data, prior and objective",
    )  # fmt: skip
    run.add_argument(
        "--resume-if-begun", action="store_true",
        help="continue the run in --out, or start it: for a command that is repeated until the run has ended",
    )  # fmt: skip
    run.add_argument(
        "--config", metavar="FILE", type=Path,
        help="a .toml file of options, such as steps = 500, or the settings.json of a run; other options override it",
    )  # fmt: skip
    run.add_argument("--no-report", action="store_true", help="stop after training, without evaluation and report")
    run.add_argument("--no-tensorboard", action="store_true", help="write no TensorBoard events")
    run.add_argument(
        "--wandb", metavar="PROJECT",
        help="also send curves and pictures to a project of Weights & Biases (WANDB_MODE=offline: keep them here)",
    )  # fmt: skip
    fields = {item.name: item for item in dataclasses.fields(Settings)}
    for title, names in GROUPS.items():
        group = run if title == "the run" else train.add_argument_group(title)
        for name in names:
            meta = fields[name].metadata
            told = "" if "(default" in meta["help"] else f" (default: {meta['by_default'] or fields[name].default})"
            text = f"{meta['help']}{told}".replace("%", "%%")
            if meta["kind"] is bool:
                group.add_argument(flag(name), action="store_true", help=meta["help"])
                continue
            by_type = {int: "N", float: "X", str: "PATH"}[meta["kind"]]
            metavar = None if meta["choices"] else meta["metavar"] or by_type
            several: dict[str, Any] = {"nargs": "+"} if meta["many"] else {}
            group.add_argument(
                flag(name), type=meta["kind"], choices=meta["choices"], metavar=metavar, help=text, **several
            )
    add_parsers(commands)
    return top


def train_command(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(Settings) if item.name in options}
    given = {name: "\n".join(value) if isinstance(value, list) else value for name, value in given.items()}
    if "config" in options:
        given = {**read_config(options.config), **given}
    ranks = parallel.start()
    try:
        return train_on(ranks, options, given, began)
    except UserError:
        if ranks.main:
            raise
        return 2  # only the main process prints the error
    finally:
        parallel.stop(ranks)


def train_on(ranks: Any, options: argparse.Namespace, given: dict[str, Any], began: float, own: Own = NOTHING) -> int:
    """Lock the run's folder, load settings and data, and train. `given`: the options of training that were given."""
    out = getattr(options, "out", None)
    if out is not None and not out.strip():
        raise UserError("--out is empty: name a folder")
    repeated = "resume_if_begun" in options or parallel.may_restart()
    if repeated and out is None:
        why = "--resume-if-begun" if "resume_if_begun" in options else "--max-restarts of torchrun"
        raise UserError(f"{why} needs --out, the folder of the run that a repeated command continues")
    out = None if out is None else Path(out)
    given = autoencoder.with_config(given)
    claim = state = begun = None
    try:
        resuming = "resume" in options
        if ranks.main:  # only the main process touches the run folder
            if out is not None and ("resume_if_begun" in options or parallel.restarted()):
                resuming = resuming or folders.holds_run(out)
            if resuming:
                claim = folders.claim_old(out, defaults(given).name)
                state = (
                    checkpoint.load(claim.folder, whole=False) if (claim.folder / checkpoint.NAME).exists() else None
                )
                begun = folders.begun(claim.folder) if state is None else None
            elif out is not None:
                folders.refuse_taken(out)  # early, before the data are read; the claim follows when they are valid
        resuming, state, begun = ranks.broadcast((resuming, state, begun))
        settings = resume(state["settings"] if state else begun, given) if state or begun else resolve(given)
        source = data.load(settings, own.data)
        if not resuming:
            settings = pace.fit_defaults(settings, given, source, ranks.size)
            if ranks.main:
                claim = folders.claim_new(out, settings.name)
        folder = ranks.broadcast(claim.folder if claim else None)
        return train_in(folder, ranks, options, settings, source, state, began, own, resuming)
    finally:
        if claim:
            claim.release()


def train_in(
    folder: Path, ranks: Any, options: argparse.Namespace, settings: Settings, source: Any, state: Any, began: float,
    own: Own, resuming: bool = False,
) -> int:  # fmt: skip
    """Train in a folder that this process has locked, from the beginning or from a checkpoint."""
    if threads := settings.threads or (state or {}).get("threads", 0):
        torch.set_num_threads(threads)  # a different number of threads would round sums differently
    if ranks.main and "wandb" in options:
        check_installed("wandb", "--wandb")
    if ranks.main and "no_report" not in options:
        check_installed("matplotlib", "The report (--no-report skips it)")
        if settings.prior in ("gmm", "vamp") and source.test_labels is not None:
            check_installed("sklearn", "The comparison of clusters with labels")
    run = start(settings, source, ranks, folder, own)
    step_time = pace.seconds_per_step(run)
    if state:
        restore(run, state)
    else:
        pretrained.load_pretrained(run.vae, settings)
    if ranks.main:
        checkpoint.prepare(folder)
        if run.shards is not None:
            run.shards.clean(state)
        checkpoint.write(
            folder / folders.SETTINGS, (json.dumps(dataclasses.asdict(settings), indent=2) + "\n").encode()
        )
        facts.keep(folder, facts.collect(options.typed, source, run.device, ranks.size))
        forecast = pace.forecast(run, step_time, "no_report" not in options)
        for line in opening(run, state, resuming, forecast):
            say(line)
    if not run.ended:
        with Terminal(run, writers(run, options)) if ranks.main else Display() as display:
            finished = loop.train(run, display)
        if not finished:
            if ranks.main:
                say(
                    f"stopped at step {run.step}; continue with: fastkl train --resume --out {shlex.quote(str(folder))}"
                )
            return 130
    reported, exported = "no_report" not in options, settings.model == AUTOENCODER
    if reported or exported:
        with run.reported():  # of all processes, which gather the weights of a sharded run
            if ranks.main and exported:
                say(f"{pretrained.save(run)}: the weights for diffusers' AutoencoderKL.from_pretrained")
            if ranks.main and reported:
                write_report_of(run, began)
    return 0


def writers(run: Run, options: argparse.Namespace) -> list[TensorBoard | WandB]:
    """The writers of curves and pictures that the options ask for."""
    found: list[TensorBoard | WandB] = []
    if "wandb" in options:
        found.append(WandB(options.wandb, run.folder, dataclasses.asdict(run.settings)))
    if "no_tensorboard" not in options:
        found.append(TensorBoard(run.folder / "tensorboard", run.step))
    return found


def opening(run: Run, state: Any, resuming: bool, forecast: list[str]) -> list[str]:
    """The lines printed before a run begins: model, expected time, data and their scaling."""
    source, settings = run.data, run.settings
    if run.ended:
        return [f"{run.folder}: finished at step {run.step:,}; {prolonging(settings)}"]
    time_needed, *hints = forecast
    if state:
        return [f"{run.folder}: continuing at step {run.step:,} of {run.total_steps:,}, {time_needed}", *hints]
    note = "no checkpoint yet, so from the beginning: " if resuming else ""
    counts = source.counts.replace("training", "training data")
    shape = " x ".join(map(str, source.shape))
    return [
        f"{run.folder}: {note}{settings.description} on {source.name}, {time_needed}",
        *hints,
        f"data: {source.source}: {counts}, each {shape}; {source.values}; {source.likelihood} likelihood",
        *(f"      {line}" for line in source.notes),
    ]
