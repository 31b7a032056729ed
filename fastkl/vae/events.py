"""Curves and pictures for TensorBoard and for Weights & Biases."""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkl.vae.checkpoint import reason, write
from fastkl.vae.data import Data
from fastkl.vae.data.arrays import first_line
from fastkl.vae.errors import UserError, require
from fastkl.vae.prior import draw

if TYPE_CHECKING:
    from fastkl.vae.run import Run

PICTURED = 16  # number of reconstructions and of samples
FRAMES = 16  # of a video, at most
WANDB_ID = "wandb_id.txt"


class TensorBoard:
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

    def images(self, step: int, pictures: dict[str, Tensor]) -> None:
        with self.report_errors():
            for name, picture in pictures.items():
                self.writer.add_images(name, picture, step)

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


class WandB:
    """A run of Weights & Biases, by default online; WANDB_MODE=offline keeps it in the run folder, in wandb/."""

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]):
        self.wandb = require("wandb", "--wandb")
        path = folder / WANDB_ID  # a resumed run continues under its first identity
        try:
            known = path.read_text(encoding="utf-8").strip() if path.exists() else secrets.token_hex(4)
            self.run = self.wandb.init(
                project=project, id=known, resume="allow", dir=str(folder), name=folder.name, config=settings
            )
        except Exception as error:  # of the network, of the account, of the disk
            raise UserError(f"--wandb {project}: {first_line(error)}; WANDB_MODE=offline needs no network") from None
        write(path, f"{known}\n".encode())

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        self.run.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def images(self, step: int, pictures: dict[str, Tensor]) -> None:
        def pixels(picture: Tensor) -> Any:
            return (255 * picture).round().byte().permute(1, 2, 0).squeeze(-1).numpy()

        named = {name: [self.wandb.Image(pixels(one)) for one in batch] for name, batch in pictures.items()}
        self.run.log(named, step=step)

    def flush(self) -> None:
        pass  # its own process writes

    def close(self, quiet: bool) -> None:
        self.run.finish(exit_code=1 if quiet else 0)


@torch.no_grad()
def pictures_of(run: Run) -> dict[str, Tensor]:
    """Reconstructions, samples and at the first point of the curves the originals, [N, C, H, W] in [0, 1]."""
    x = run.data.watched[:PICTURED].to(run.device)
    z = draw(run.prior, run.vae, PICTURED, run.settings.seed, "pictures").to(run.device)
    pictures = {"reconstruction": run.vae.pictured(run.vae.posterior(x).mean), "sample": run.vae.pictured(z)}
    if not run.history[run.data.watched_name][:-1]:
        pictures["original"] = x
    return {name: shades(picture, run.data) for name, picture in pictures.items()}


def shades(picture: Tensor, data: Data) -> Tensor:
    """Values scaled to [0, 1] by the range of the training data; only the first channel unless there are three. The
    frames of a video lie side by side in one picture."""
    picture = tiled(picture) if picture.dim() == 5 else picture
    low, high = data.range
    scaled = ((picture.float().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1)
    return scaled if scaled.shape[1] in (1, 3) else scaled[:, :1]


def tiled(video: Tensor) -> Tensor:
    """Up to 16 frames of videos [N, C, T, H, W], in rows: [N, C, rows * H, columns * W]."""
    count = min(FRAMES, video.shape[2])
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    shown = torch.linspace(0, video.shape[2] - 1, count, dtype=torch.float32, device="cpu").round().long()
    frames = F.pad(video[:, :, shown.to(video.device)], (0, 0, 0, 0, 0, rows * columns - count))
    return frames.unflatten(2, (rows, columns)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
