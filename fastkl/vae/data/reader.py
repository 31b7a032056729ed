"""The data of each step, read ahead by other processes if the run has --workers."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastkl.vae import streams
from fastkl.vae.data.stored import Stored
from fastkl.vae.errors import UserError

AHEAD = 2  # steps that each worker reads ahead


class BadData(UserError):
    """Data that cannot be read. The weights are those of the last whole step."""


class Steps(Dataset):
    """This process's data of every step and "", or None and the message of an error if they cannot be read.

    The data are a function of the step (streams.py), so a resumed run needs no state of the workers.
    """

    def __init__(self, run: Any):
        self.train, self.seed, self.batch, self.ranks = run.data.train, run.settings.seed, run.batch_size, run.ranks
        self.parts = run.settings.accumulate

    def __getitem__(self, step: int) -> tuple[Tensor | None, str]:
        indices = streams.batch_indices(self.seed, step, len(self.train), self.batch)
        indices = self.ranks.share(indices, self.parts)
        if isinstance(self.train, Tensor):
            return self.train[indices], ""
        try:
            return self.train.view(indices, step // (len(self.train) // self.batch)), ""
        except UserError as error:  # DataLoader would add the traceback of a worker to the message
            return None, str(error)


class Reader:
    """A reader of the data of a run, step by step. Any step may come first."""

    def __init__(self, run: Any):
        self.run, self.steps = run, Steps(run)
        self.ahead: Iterator[Any] | None = None
        self.next = -1  # the step that the workers have read

    def at(self, step: int) -> Tensor:
        """The data of this step and process, on its device.

        Raises:
            BadData: a process of the run cannot read its data. Then every process raises it.
        """
        x, problem = self.from_workers(step) if self.run.settings.workers else self.steps[step]
        ranks = self.run.ranks
        if ranks.size > 1 and isinstance(self.steps.train, Stored):
            bad = torch.full((), float(bool(problem)), dtype=torch.float32, device="cpu")
            if ranks.mean(bad) > 0:
                problem = next(filter(None, ranks.collect(problem)))
        if x is None or problem:
            raise BadData(problem)
        return x.to(self.run.device, non_blocking=True)

    def from_workers(self, step: int) -> tuple[Tensor | None, str]:
        """As an item of `Steps`, from the workers. They start at the first step, and again after a jump."""
        if self.ahead is None or step != self.next:
            self.ahead, self.next = self.start(step), step
        self.next += 1
        try:
            return next(self.ahead)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            self.close()
            return None, "a process of --workers was killed, perhaps because the memory was full: use fewer --workers"

    def start(self, step: int) -> Iterator[Any]:
        """Processes that read the data from a step on."""
        steps, cuda = range(step, max(step + 1, self.run.total_steps)), self.run.device.type == "cuda"
        loader = DataLoader(
            self.steps, batch_size=None, sampler=steps, num_workers=self.run.settings.workers,  # type: ignore[arg-type]
            prefetch_factor=AHEAD, worker_init_fn=ignore_signals, pin_memory=cuda,
            generator=torch.Generator(),
        )  # fmt: skip
        number = getattr(signal, "SIGCHLD", None)
        before = None if number is None else signal.getsignal(number)
        ahead = iter(loader)
        if number is not None and before is not None:
            # torch's handler raises an error at the death of a worker, even in the middle of an update of weights. It
            # sets none outside the main thread, where this is a ValueError.
            with contextlib.suppress(ValueError):
                signal.signal(number, before)
        return ahead

    def close(self) -> None:
        """End the workers."""
        self.ahead = None


def ignore_signals(worker: int) -> None:
    """A terminal's Ctrl-C and a scheduler's SIGTERM reach the workers too, but the run still needs its current step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
