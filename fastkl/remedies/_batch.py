"""Shared parts of remedies: checked thresholds in nats, and means over the batch of a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops import _group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def nats(name: str, value: float | Tensor) -> float | Tensor:
    """A checked threshold of the KL, without gradient."""
    value = arguments.check_weight(name, value)
    return value.detach() if isinstance(value, Tensor) else value


def check_group(group: ProcessGroup | None, per: str) -> None:
    if group is None:
        return
    if per != "batch":
        raise ValueError(f'group needs per="batch", the mean over the batch, got per="{per}"')
    _group.check_group(group)


def batch_mean(sums: Tensor, rows: int, group: ProcessGroup | None) -> Tensor:
    """Sums over this process's rows, divided by the rows of all processes. One exchange, no synchronisation."""
    if group is None:
        return sums / rows if rows else sums * float("nan")
    both = _group.total(group, torch.cat([sums.reshape(-1), sums.new_full((1,), rows)]))
    return (both[:-1] / both[-1]).view(sums.shape)
