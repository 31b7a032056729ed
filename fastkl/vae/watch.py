"""The monitors of a run: each step records its posteriors, and each epoch ends with the monitors' figures."""

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

# The figure of each monitor.
READ = {
    "active_units": lambda units: units.count(),
    "kl_per_dimension": lambda kl: kl.compute().flatten().tolist(),
    "mutual_information": lambda information: information.compute().item(),
    "used_components": lambda usage: usage.compute().used,
}
GRACE = 0.2  # share of the run before the first warning: at the start every posterior is near the prior


class Watch:
    """Active units and the KL of each dimension over the data of an epoch; mutual information and used components over
    the batches of the curves' points. All figures are of all processes together."""

    def __init__(self, settings: Settings, ranks: Ranks):
        self.settings, self.ranks = settings, ranks
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

    def record(self, step: int, posterior: DiagonalNormal, prior: Prior | None) -> None:
        """Add the posteriors of a step, without a synchronisation with the device."""
        for monitor in self.of_all:
            monitor.update(posterior)
        if step % self.settings.log_every == 0:
            self.information.update(posterior)
            if is_mixture(prior):
                moments = fastkl.gmm_moments(posterior.mean.flatten(1), **prior.mixture().named())
                self.usage.update(moments)

    def figures(self) -> dict[str, Any]:
        """The figures since the last call, a collective call: every process must make it."""
        figures: dict[str, Any] = {}
        for name, monitor in self.monitors.items():
            try:
                figures[name] = READ[name](monitor)
            except ValueError:  # empty: no step was recorded
                continue
            monitor.reset()
        return figures

    def warnings(self, step: int, total: int, figures: dict[str, Any], sample_size: float | None) -> list[str]:
        """Warnings of a collapse that were not given before, each with its remedies."""
        if step < min(total, self.settings.warm_up + GRACE * total):  # the last step always warns
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
        """The monitors' states on each process, a collective call: every process must make it."""
        states = {name: monitor.state for name, monitor in self.monitors.items() if monitor.state is not None}
        own = {name: [state.count, *(value.cpu() for value in state.values)] for name, state in states.items()}
        return {"monitors": self.ranks.collect(own), "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Give each process its own state on `device`, where each step adds to it. The main process gets all of them if
        the number of processes has changed."""
        self.warned = [list(row) for row in state["warned"]]
        parts = state["monitors"]
        if len(parts) == self.ranks.size:
            parts = [parts[self.ranks.rank]]
        elif not self.ranks.main:
            parts = []
        for part in parts:
            for name, (count, *values) in part.items():
                self.monitors[name].add(State(int(count), tuple(value.to(device) for value in values)))


def kind_of(line: str) -> str:
    """A warning without its figures, which change from epoch to epoch."""
    return line.partition(" (")[0]
