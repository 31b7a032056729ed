"""A guard that skips steps with a non-finite loss or gradient, and stops a run after too many in a row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.vae.errors import UserError
from fastkl.vae.parallel import Ranks, local

ALONE = Ranks()


class Diverged(UserError):
    """Too many bad steps in a row. The weights are those of the last good step."""


class Guard:
    """A check between `backward` and the optimiser's step: are loss and gradients finite?

        if guard.admit(loss, model.parameters(), step):
            optimizer.step()

    Skipping a bad step protects the weights and the optimiser's moments, which a single NaN would ruin permanently. All
    processes decide together, because a step skipped by only one of them would make their weights diverge.

    Args:
        patience: the number of bad steps in a row that stops the run; 1 or more.
        ranks: the processes that decide together.
        checkpoint: the file that the error mentions.
    """

    def __init__(self, patience: int = 10, ranks: Ranks = ALONE, checkpoint: Path | None = None):
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience, self.ranks, self.checkpoint = patience, ranks, checkpoint
        self.skipped = self.in_a_row = 0

    @torch.no_grad()
    def admit(self, loss: Tensor, parameters: Iterable[Tensor], step: int | None = None, scaled: bool = False) -> bool:
        """Whether the loss of every process and all gradients are finite. It synchronises once with the device if so.

        `scaled`: a smaller scale of the loss may make the gradients finite, so a skipped step does not count.

        Raises:
            Diverged: this is bad step number `patience` in a row.
        """
        parameters = list(parameters)
        bad_loss, bad_gradient = self.bad(loss, norm(parameters, 2.0, loss))
        if bad_gradient:
            # The sum of squares of finite gradients may overflow. Their maximum decides; it is computed only in this
            # case, because it takes a CPU ten times as long.
            bad_loss, bad_gradient = self.bad(loss, norm(parameters, math.inf, loss))
        if bad_loss == bad_gradient == 0:
            self.in_a_row = 0
            return True
        if scaled and not bad_loss:
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.patience:
            raise Diverged(self.message("the loss" if bad_loss else "a gradient", step))
        return False

    def bad(self, *values: Tensor) -> list[float]:
        """For each value, the share of processes on which it is not finite."""
        finite = torch.stack([value.detach().reshape(()).isfinite() for value in values])
        return self.ranks.mean((~finite).float()).tolist()

    def message(self, what: str, step: int | None) -> str:
        """The text of Diverged; `what` was not finite."""
        times = f"{self.in_a_row} times in a row, the last" if self.in_a_row > 1 else "once"
        place = "" if step is None else f" at step {step}"
        kept = "no checkpoint yet"
        if self.checkpoint is not None and self.checkpoint.exists():
            kept = f"{self.checkpoint} is of an earlier step"
        return f"{what} was not finite {times}{place}: try a smaller --learning-rate ({kept})"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])


def norm(parameters: list[Tensor], kind: float, like: Tensor) -> Tensor:
    """The norm of all gradients of this process together, on the device of `like`."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), dtype=torch.float32, device=like.device)
    return nn.utils.get_total_norm(gradients, norm_type=kind).to(like.device)
