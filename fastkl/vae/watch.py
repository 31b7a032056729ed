"""What is watched while a run goes on: fed by the steps with the posteriors of their loss, read at each epoch's end."""

from __future__ import annotations

import math
from typing import Any

import torch

import fastkl
from fastkl import DiagonalNormal, monitors
from fastkl.monitors import ActiveUnits, ComponentUsage, KLPerDimension, MutualInformation
from fastkl.monitors._monitor import Monitor, State
from fastkl.priors import Prior
from fastkl.vae.parallel import Ranks
from fastkl.vae.prior import is_mixture
from fastkl.vae.settings import Settings

# How each is read.
READ = {
    "active_units": lambda units: units.count(),
    "kl_per_dimension": lambda kl: kl.compute().flatten().tolist(),
    "mutual_information": lambda information: information.compute().item(),
    "used_components": lambda usage: usage.compute().used,
}
GRACE = 0.2  # of the run, before the first warning: at first every posterior is the prior


class Watch:
    """Active units and the KL of each dimension over the data of an epoch; mutual information and used components over
    the batches at which curves have their points. Everything is of all processes together."""

    def __init__(self, settings: Settings, ranks: Ranks):
        self.settings = settings
        self.warned: list[list[Any]] = []  # step, line
        active, per_dimension = ActiveUnits(group=ranks.group), KLPerDimension(group=ranks.group)
        self.of_all = (active, per_dimension)
        self.information = MutualInformation(group=ranks.group)
        self.usage = ComponentUsage(group=ranks.group)
        self.monitors: dict[str, Monitor] = {
            "active_units": active,
            "kl_per_dimension": per_dimension,
            "mutual_information": self.information,
            "used_components": self.usage,
        }

    def saw(self, step: int, posterior: DiagonalNormal, prior: Prior | None) -> None:
        """The posteriors of a step; nothing is read from the device."""
        for monitor in self.of_all:
            monitor.update(posterior)
        if step % self.settings.log_every == 0:
            self.information.update(posterior)
            if is_mixture(prior):
                moments = fastkl.gmm_moments(posterior.mean.flatten(1), **prior.mixture().named())
                self.usage.update(moments)

    def figures(self) -> dict[str, Any]:
        """Since the last call; every process must call it."""
        found: dict[str, Any] = {}
        for name, monitor in self.monitors.items():
            try:
                found[name] = READ[name](monitor)
            except ValueError:  # nobody has seen anything yet
                continue
            monitor.reset()
        return found

    def warnings(self, step: int, total: int, figures: dict[str, Any], sample_size: float | None) -> list[str]:
        """What is new among the signs of a collapse, each with its remedies."""
        if step < min(total, self.settings.warm_up + GRACE * total):  # at the end it is said in any case
            return []
        per_dimension = figures["kl_per_dimension"]
        lines = monitors.diagnose(
            kl=math.fsum(per_dimension), active_units=figures["active_units"], latent_units=len(per_dimension),
            used_components=figures.get("used_components"), components=self.settings.components,
            effective_sample_size=sample_size, samples=self.settings.samples,
        )  # fmt: skip
        known = {kind_of(line) for _, line in self.warned}
        new = [line for line in lines if kind_of(line) not in known]
        self.warned += [[step, line] for line in new]
        return new

    def state_dict(self) -> dict[str, Any]:
        """What all processes saw together; every process must call it."""
        states = {name: everything(monitor) for name, monitor in self.monitors.items()}
        kept = {name: [state.count, *state.values] for name, state in states.items() if state is not None}
        return {"monitors": kept, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any], main: bool = True, device: torch.device | None = None) -> None:
        """What all processes saw is the main one's from here on; on the device of what it will see, or each step would
        wait for that."""
        self.warned = [list(row) for row in state["warned"]]
        for name, (count, *values) in state["monitors"].items():
            if main:
                self.monitors[name].state = State(int(count), tuple(value.to(device) for value in values))


def everything(monitor: Monitor) -> State | None:
    try:
        return monitor.everything()
    except ValueError:  # nobody has seen anything yet
        return None


def kind_of(line: str) -> str:
    return line.partition(" (")[0]
