"""Scheduled values of a step: functions of the step number alone, so that resuming needs no state."""

from __future__ import annotations

import math

from fastkl import schedules
from fastkl.vae.settings import Settings

TEST_POINTS = 25  # points of the test curve over the run
WARM_UP = 100  # steps over which the learning rate rises, at most


def learning_rate(settings: Settings, step: int, total: int, rate: float) -> float:
    """A short rise, then constant or half a cosine. Only the cosine depends on `total`, so a constant run may be
    extended."""
    rise = settings.learning_rate_warm_up
    if settings.schedule == "constant":
        return rate * min(1.0, (step + 1) / (rise or WARM_UP))
    rise = rise or min(WARM_UP, max(1, total // 10))
    return rate * min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / total))


def kl_weight(settings: Settings, step: int) -> float:
    """The weight of the KL: from 0 to --beta over --warm-up."""
    rise = getattr(schedules, settings.beta_schedule)
    cycles = {"cycles": settings.cycles} if settings.beta_schedule == "cyclical" else {}
    return rise(step + 1, 0.0, settings.beta, steps=settings.warm_up, **cycles)


def capacity(settings: Settings, step: int) -> float:
    """The target of the KL: from 0 to --capacity over --capacity-steps."""
    return float(schedules.linear(step + 1, 0.0, max(0.0, settings.capacity), steps=settings.capacity_steps))


def temperature(settings: Settings, step: int, total: int) -> float:
    """The temperature: from --tau at the first step of the prior to --final-tau at the last step of the run."""
    fall = getattr(schedules, settings.tau_schedule)
    last = total - 1 - settings.warm_up
    return fall(step - settings.warm_up, settings.tau, settings.final_tau, steps=max(0, last))
