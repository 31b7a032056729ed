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

PICTURED = 16  # reconstructions and samples


class Events:
    """A SummaryWriter whose errors are said in one line, wherever they happen."""

    def __init__(self, folder: Path, step: int):
        board = require("torch.utils.tensorboard", "TensorBoard output (--no-tensorboard leaves it out)")
        self.folder = folder
        # The thread that writes prints a traceback when the disk is full; its error comes here too, at the next call.
        self.hook, threading.excepthook = threading.excepthook, self.heard
        with self.said():
            # Events after the checkpoint come again, so the ones written before the process died are struck out.
            self.writer = board.SummaryWriter(str(folder), purge_step=step + 1)

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        with self.said():
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    @torch.no_grad()
    def images(self, run: Run, step: int) -> None:
        x = run.data.watched[:PICTURED].to(run.device)
        z = draw(run.prior, run.vae, PICTURED, run.settings.seed, "pictures").to(run.device)
        pictures = {"reconstruction": run.vae.pictured(run.vae.posterior(x).mean), "sample": run.vae.pictured(z)}
        if not run.history[run.data.watched_name][:-1]:
            pictures["original"] = x
        with self.said():
            for name, picture in pictures.items():
                self.writer.add_images(name, shades(picture, run.data), step)

    def flush(self) -> None:
        with self.said():
            self.writer.flush()

    def close(self, quiet: bool) -> None:
        """`quiet`: another error is on its way to the person already."""
        try:
            with self.said():
                self.writer.close()
        except UserError:
            if not quiet:
                raise
        finally:
            threading.excepthook = self.hook

    def heard(self, args: Any) -> None:
        if not isinstance(args.exc_value, OSError):
            self.hook(args)

    @contextlib.contextmanager
    def said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.folder}: TensorBoard events cannot be written: {reason(error)}") from None


def shades(picture: Tensor, data: Data) -> Tensor:
    """Values as shades in [0, 1], over the range of the training data; one channel if there are not three."""
    low, high = data.train.min().item(), data.train.max().item()
    scaled = ((picture.float().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1)
    return scaled if scaled.shape[1] in (1, 3) else scaled[:, :1]
