"""Curves and pictures for TensorBoard."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkl.vae.checkpoint import reason
from fastkl.vae.data import Data
from fastkl.vae.errors import UserError, require
from fastkl.vae.prior import draw

if TYPE_CHECKING:
    from fastkl.vae.run import Run

PICTURED = 16  # number of reconstructions and of samples


class Events:
    """A SummaryWriter that turns its errors, also those of its thread, into UserErrors."""

    def __init__(self, folder: Path, step: int):
        board = require("torch.utils.tensorboard", "TensorBoard output (--no-tensorboard skips it)")
        self.folder = folder
        # If the disk is full, the writer's thread would print a traceback. The next call raises the same error here.
        self.hook, threading.excepthook = threading.excepthook, self.on_thread_error
        with self.report_errors():
            # A resumed run repeats the steps after its checkpoint, so their earlier events are purged.
            self.writer = board.SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        with self.report_errors():
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    @torch.no_grad()
    def images(self, run: Run, step: int) -> None:
        x = run.data.watched[:PICTURED].to(run.device)
        z = draw(run.prior, run.vae, PICTURED, run.settings.seed, "pictures").to(run.device)
        pictures = {"reconstruction": run.vae.pictured(run.vae.posterior(x).mean), "sample": run.vae.pictured(z)}
        if not run.history[run.data.watched_name][:-1]:
            pictures["original"] = x
        with self.report_errors():
            for name, picture in pictures.items():
                self.writer.add_images(name, shades(picture, run.data), step)

    def flush(self) -> None:
        with self.report_errors():
            self.writer.flush()

    def close(self, quiet: bool) -> None:
        """`quiet`: errors are suppressed, because another one is being raised."""
        try:
            with self.report_errors():
                self.writer.close()
        except UserError:
            if not quiet:
                raise
        finally:
            threading.excepthook = self.hook

    def on_thread_error(self, args: Any) -> None:
        if not isinstance(args.exc_value, OSError):
            self.hook(args)

    @contextlib.contextmanager
    def report_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder}: TensorBoard events cannot be written: {reason(error)}") from None


def shades(picture: Tensor, data: Data) -> Tensor:
    """Values scaled to [0, 1] by the range of the training data; only the first channel unless there are three."""
    low, high = data.range
    scaled = ((picture.float().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1)
    return scaled if scaled.shape[1] in (1, 3) else scaled[:, :1]
