"""The display of a run: a bar in a terminal, lines in a log, and the curves and pictures of events.py."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastkl.vae.errors import require
from fastkl.vae.events import TensorBoard, WandB, pictures_of
from fastkl.vae.prior import is_mixture

if TYPE_CHECKING:
    from fastkl.vae.run import Run


class Steady:
    """A stream without errors: a run continues when its terminal, pipe or disk is gone."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            mute(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            mute(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def say(line: str, error: bool = False) -> None:
    """Print a line, or an error to stderr, without an error of its own if the stream is gone."""
    print(line, file=Steady(sys.stderr if error else sys.stdout), flush=True)


def mute(stream: Any) -> None:
    """Redirect a stream to the null device."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Display:
    """A display without output, for processes other than the main one. `Terminal` overrides the methods."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def trained(self, step: int, elbo: float, kl: float, reconstruction: float, terms: dict[str, float]) -> None:
        """Show a point of the training curves."""

    def tested(self, run: Run, step: int, elbo: float, kl: float, reconstruction: float) -> None:
        """Show a point of the held-out curve."""

    def monitored(self, step: int, figures: dict[str, float], warnings: list[str]) -> None:
        """Show the monitors' figures of an epoch, and new warnings of a collapse."""

    def stepped(self, step: int) -> None:
        """Show the end of a step."""

    def flush(self) -> None:
        """Write pending events to the disk, before a checkpoint."""


class Terminal(Display):
    """A progress bar on a terminal, about twenty plain lines in a log; curves and pictures for each writer."""

    def __init__(self, run: Run, writers: Sequence[TensorBoard | WandB] = ()):
        self.total, self.batch_size, self.first = run.total_steps, run.batch_size, run.step
        self.began = time.perf_counter()
        self.values: dict[str, float] = {}  # empty before the first point of the curves
        self.used = self.skipped = ""
        self.bar = None
        self.writers = writers
        if sys.stdout.isatty():
            self.bar = make_bar()
            self.task = self.bar.add_task("training", total=self.total, completed=run.step, text="")

    def __enter__(self) -> Terminal:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()
        for writer in self.writers:
            writer.close(quiet=error != (None, None, None))

    def trained(self, step: int, elbo: float, kl: float, reconstruction: float, terms: dict[str, float]) -> None:
        self.values.update(ELBO=elbo, KL=kl)
        values = {"elbo": elbo, "kl": kl, "reconstruction": reconstruction, **terms}
        values["data_per_second"] = self.rate(step)
        self.write("train", step, values)

    def tested(self, run: Run, step: int, elbo: float, kl: float, reconstruction: float) -> None:
        name = "validation" if "validation" in run.history else "test"
        self.values[name] = elbo
        values = {"elbo": elbo, "kl": kl, "reconstruction": reconstruction}
        if is_mixture(run.prior):
            names = ("kl_lower", "kl_estimate", "kl_upper", "used_components", "tau")
            values.update(zip(names, run.history["mixture"][-1][1:]))
            self.used = f"  {values['used_components']} of {run.settings.components} used"
        self.write(name, step, values)
        if self.writers and len(run.data.shape) > 1:
            pictures = pictures_of(run)
            for writer in self.writers:
                writer.images(step, pictures)
        if not self.bar:
            say(f"step {step}/{self.total}  {self.line(step)}")

    def monitored(self, step: int, figures: dict[str, float], warnings: list[str]) -> None:
        self.skipped = f"  {figures['skipped_steps']} skipped" if figures["skipped_steps"] else ""
        self.write("monitors", step, figures)
        tell = self.bar.console.print if self.bar else say
        for line in warnings:
            tell(f"step {step}: {line}")

    def stepped(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, text=self.line(step))

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def write(self, group: str, step: int, values: dict[str, float]) -> None:
        for writer in self.writers:
            writer.scalars(group, step, values)

    def rate(self, step: int) -> float:
        return (step - self.first) * self.batch_size / max(time.perf_counter() - self.began, 1e-9)

    def line(self, step: int) -> str:
        order = sorted(self.values, key=lambda name: name in ("test", "validation"))  # training figures first
        known = "  ".join(f"{name} {self.values[name]:.2f}" for name in order)
        return f"{known}{' nats' if known else ''}{self.used}{self.skipped}  {self.rate(step):,.0f}/s"


def make_bar() -> Any:
    progress = require("rich.progress", "The progress bar")
    console = require("rich.console", "The progress bar").Console(file=Steady(sys.stdout))
    return progress.Progress(
        progress.BarColumn(bar_width=12),  # the rest of 80 columns is for the numbers
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(compact=True),
        console=console, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
