"""The base class of monitors: a state that updates, other monitors and other processes add to."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastkl.distributions import DiagonalNormal
from fastkl.ops import _group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class State(NamedTuple):
    """The state of `count` observations: float64 sums, or other values that `Monitor.combine` merges."""

    count: int  # type: ignore[assignment]  # which hides tuple.count
    values: tuple[Tensor, ...]


class Monitor:
    """The base class of monitors, with reset and merge; subclasses add update and compute."""

    def __init__(self, *, group: ProcessGroup | None = None) -> None:
        if group is not None:
            _group.check_group(group)
        self.group = group
        self.reset()

    def reset(self) -> None:
        """Remove all observations."""
        self.state: State | None = None

    def merge(self, other: Monitor) -> None:
        """Add the observations of another monitor of the same type."""
        if type(other) is not type(self):
            raise TypeError(f"other must be another {type(self).__name__}, got {type(other).__name__}")
        if other.state is not None:
            self.add(other.state)

    def add(self, state: State) -> None:
        if state.count == 0:
            return
        if self.state is None:
            self.state = state
            return
        expected, got = ([tuple(value.shape) for value in s.values] for s in (self.state, state))
        if expected != got:
            raise ValueError(f"{type(self).__name__} expected values of shape {expected[0]} as before, got {got[0]}")
        values = tuple(new.to(old.device) for old, new in zip(self.state.values, state.values))
        self.state = self.combine(self.state, State(state.count, values))

    def combine(self, one: State, other: State) -> State:
        """The merged state; for sums, their sum."""
        return State(one.count + other.count, tuple(a + b for a, b in zip(one.values, other.values)))

    def everything(self) -> State:
        """The merged state of all processes, in the order of their ranks, so that it is bitwise the same on each."""
        state = self.state
        if self.group is not None and torch.distributed.get_world_size(self.group) > 1:
            # As objects, because a process without observations does not know the shapes.
            own = None if state is None else State(state.count, tuple(value.cpu() for value in state.values))
            states: list[State | None] = [None] * torch.distributed.get_world_size(self.group)
            torch.distributed.all_gather_object(states, own, group=self.group)
            together = type(self).__new__(type(self))
            together.reset()
            for each in states:
                if each is not None:
                    together.add(each)
            state = together.state
        if state is None:
            raise ValueError(f"{type(self).__name__}.compute needs an update before it")
        return state

    def mean(self) -> Tensor:
        """The first sum divided by the count."""
        count, (total, *_) = self.everything()
        return total / count


def posterior_rows(q: DiagonalNormal) -> tuple[Tensor, Tensor]:
    """mean and ln sigma^2 [N, D]."""
    check_posterior(q)
    mu, logvar = (tensor.detach().flatten(0, -2) for tensor in q.vectors())
    return mu, logvar


def check_posterior(q: DiagonalNormal) -> None:
    if not isinstance(q, DiagonalNormal):
        raise TypeError(f"q must be a fastkl.DiagonalNormal, got {type(q).__name__}")
    if len(q.shape) == q.event_ndim:
        raise ValueError(f"q must have a batch dimension, got {q}")
