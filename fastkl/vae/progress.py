"""What a person sees while a run goes on: a bar in the terminal, and curves and pictures in TensorBoard."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkl.vae import streams
from fastkl.vae.errors import require

if TYPE_CHECKING:
    from fastkl.vae.train import Run

PICTURED = 16  # reconstructions and samples in TensorBoard


class Display:
    """A display that shows nothing: what processes other than the main one have. `Terminal` fills in the methods."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def trained(self, step: int, elbo: float, kl: float, reconstruction: float) -> None:
        pass

    def tested(self, run: Run, step: int, elbo: float, kl: float, reconstruction: float) -> None:
        pass

    def stepped(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass


class Terminal(Display):
    """A rich bar on a terminal, some twenty plain lines in a log; TensorBoard events if a folder is given."""

    def __init__(self, run: Run, events: Path | None):
        self.total, self.batch_size, self.first = run.total_steps, run.batch_size, run.step
        self.began = time.perf_counter()
        self.values = {"elbo": float("nan"), "kl": float("nan"), "test": float("nan")}
        self.bar = self.writer = None
        if events is not None:
            board = require("torch.utils.tensorboard", "TensorBoard output (--no-tensorboard leaves it out)")
            # Events after the checkpoint come again, so the ones written before the process died are struck out.
            self.writer = board.SummaryWriter(str(events), purge_step=run.step + 1)
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
        if self.writer:
            self.writer.close()

    def trained(self, step: int, elbo: float, kl: float, reconstruction: float) -> None:
        self.values.update(elbo=elbo, kl=kl)
        self.scalars("train", step, elbo=elbo, kl=kl, reconstruction=reconstruction, data_per_second=self.rate(step))

    def tested(self, run: Run, step: int, elbo: float, kl: float, reconstruction: float) -> None:
        self.values["test"] = elbo
        self.scalars("test", step, elbo=elbo, kl=kl, reconstruction=reconstruction)
        if self.writer and len(run.data.shape) == 3:
            self.images(run, step)
        if not self.bar:
            print(f"step {step}/{self.total}  {self.line(step)}", flush=True)

    def stepped(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, text=self.line(step))

    def flush(self) -> None:
        if self.writer:
            self.writer.flush()

    def rate(self, step: int) -> float:
        return (step - self.first) * self.batch_size / max(time.perf_counter() - self.began, 1e-9)

    def line(self, step: int) -> str:
        elbo, kl, test = (self.values[name] for name in ("elbo", "kl", "test"))
        return f"ELBO {elbo:.2f}  KL {kl:.2f}  test ELBO {test:.2f} nats  {self.rate(step):,.0f}/s"

    def scalars(self, group: str, step: int, **values: float) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    @torch.no_grad()
    def images(self, run: Run, step: int) -> None:
        x = run.data.test[:PICTURED].to(run.device)
        generator = streams.generator(run.settings.seed, "pictures")
        noise = torch.randn((PICTURED, *run.vae.latent_shape), generator=generator)
        mean = run.vae.posterior(x).mean
        for name, picture in (("original", x), ("reconstruction", run.vae.pictured(mean)),
                              ("sample", run.vae.pictured(noise.to(run.device)))):  # fmt: skip
            if name != "original" or step == run.total_steps:
                self.writer.add_images(name, spread(picture, run.data), step)


def spread(picture: torch.Tensor, data: Any) -> torch.Tensor:
    """Values as shades in [0, 1]; the range is that of the training data."""
    low, high = data.train.min().item(), data.train.max().item()
    shades = ((picture.float().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1)
    return shades[:, :1] if shades.shape[1] not in (1, 3) else shades


def make_bar() -> Any:
    rich = require("rich.progress", "The progress bar")
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=30),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[text]}"),
        rich.TimeRemainingColumn(),
    )
