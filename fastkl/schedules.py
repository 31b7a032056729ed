"""Schedules over a run: of the KL's weight (beta), its target (a capacity), or a relaxation's temperature (tau).

Every schedule is a function of the step only, so resuming needs no state. A step given as a number gives a float; a
step given as a tensor gives a tensor on its device, by torch ops. A compiled training step is not recompiled for new
values of a tensor step, nor of a tensor that is filled with the float outside.

    beta = torch.ones(())                                       # once
    beta.fill_(schedules.linear(step, 0.0, 1.0, steps=500))     # every step: KL warm-up
    tau.fill_(schedules.exponential(step, 1.0, 0.1, steps=5000))  # every step: for fastkl.gumbel_softmax
"""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor


def linear(step: float | Tensor, start: float, end: float, *, steps: float) -> float | Tensor:
    """start + (end - start) step / steps up to `steps`, then `end`: the usual KL warm-up.

    Source: Bowman et al. 2016, "Generating Sentences from a Continuous Space", arXiv:1511.06349, section 3.1.

    >>> from fastkl import schedules
    >>> [schedules.linear(step, 0.0, 1.0, steps=4) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """
    part = progress(step, steps)
    return _between(start, end, part)


def cosine(step: float | Tensor, start: float, end: float, *, steps: float) -> float | Tensor:
    """As `linear`, along half a cosine, with slope 0 at both ends.

    >>> from fastkl import schedules
    >>> schedules.cosine(5, 0.0, 1.0, steps=20) < schedules.linear(5, 0.0, 1.0, steps=20)
    True
    """
    angle = math.pi * progress(step, steps)
    part = 0.5 - 0.5 * (torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle))
    return _between(start, end, part)


def exponential(step: float | Tensor, start: float, end: float, *, steps: float) -> float | Tensor:
    """start^(1 - p) end^p with p = step / steps up to `steps`, then `end`: equal factors in equal times, the usual
    annealing of a temperature.

    Raises:
        ValueError: start or end is not above 0.

    Source: Jang, Gu and Poole 2017, "Categorical Reparameterization with Gumbel-Softmax",
    arXiv:1611.01144, section 2.2.

    >>> from fastkl import schedules
    >>> [round(schedules.exponential(step, 1.0, 0.01, steps=2), 6) for step in (0, 1, 2, 3)]
    [1.0, 0.1, 0.01, 0.01]
    """
    _check_single(start=start, end=end)
    if not (start > 0 and end > 0):
        raise ValueError(f"start and end must be above 0 for an exponential schedule, got {start} and {end}")
    part = progress(step, steps)
    return start ** (1 - part) * end**part


def sigmoid(
    step: float | Tensor, start: float, end: float, *, steps: float, steepness: float = 10.0
) -> float | Tensor:  # fmt: skip
    """As `linear`, along the logistic function: slow at both ends, steep in the middle.

    With p = step / steps and s(p) = 1 / (1 + exp(-steepness (p - 1/2))), the value is at the fraction
    (s(p) - s(0)) / (s(1) - s(0)) between `start` and `end`. As steepness -> 0 it becomes `linear`.

    Raises:
        ValueError: steepness is not a finite number above 0.

    Source: Bowman et al. 2016, "Generating Sentences from a Continuous Space", arXiv:1511.06349, section 3.1.

    >>> from fastkl import schedules
    >>> [round(schedules.sigmoid(step, 0.0, 1.0, steps=4), 3) for step in (0, 1, 2, 3, 4)]
    [0.0, 0.07, 0.5, 0.93, 1.0]
    """
    _check_single(steepness=steepness)
    if not 0 < steepness < math.inf:
        raise ValueError(f"steepness must be a finite number above 0, got {steepness}")
    # s is 1/2 + 1/2 tanh of half its argument, which is symmetric about the middle, so both ends are exact.
    place = (progress(step, steps) - 0.5) * (0.5 * steepness)
    level = torch.tanh(place) if isinstance(place, Tensor) else math.tanh(place)
    part = 0.5 + 0.5 * (level / math.tanh(0.25 * steepness))
    return _between(start, end, part)


def cyclical(
    step: float | Tensor, start: float, end: float, *, steps: float, cycles: int = 4, ratio: float = 0.5
) -> float | Tensor:  # fmt: skip
    """`cycles` repetitions of a linear change from `start` to `end` in the first `ratio` of a cycle, then `end`.

    All cycles together take `steps`; after them the value stays at `end`.

    Args:
        cycles: number of cycles, 1 or more.
        ratio: the share of a cycle that rises, in [0, 1]; with 0 the value is always `end`.

    Raises:
        ValueError: cycles or ratio is out of range.

    Source: Fu et al. 2019, "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing",
    arXiv:1903.10145, equations 6 and 7.

    >>> from fastkl import schedules
    >>> [schedules.cyclical(step, 0.0, 1.0, steps=8, cycles=2) for step in range(9)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    if isinstance(cycles, bool) or not isinstance(cycles, (int, np.integer)) or cycles < 1:
        raise ValueError(f"cycles must be an int, 1 or more, got {cycles}")
    _check_single(ratio=ratio)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be within [0, 1], got {ratio}")
    over = progress(step, steps)  # checks steps; 0 before the first cycle, 1 after the last
    # The remainder of whole numbers is exact: rounding cannot delay the start of a cycle by a step.
    within = (step * cycles % steps) / steps if steps else over
    part: float | Tensor
    if isinstance(over, Tensor) and isinstance(within, Tensor):
        part = (within / ratio).clamp(0, 1) if ratio else torch.ones_like(over)
        part = torch.where(over >= 1, 1.0, torch.where(over <= 0, 0.0 if ratio else 1.0, part))
    else:
        part = min(1.0, within / ratio) if ratio else 1.0
        part = 1.0 if over >= 1 else part if over > 0 or not ratio else 0.0
    return _between(start, end, part)


def progress(step: float | Tensor, steps: float) -> float | Tensor:
    """step / steps clamped to [0, 1]; 1 if steps is 0."""
    _check(step=step)
    _check_single(steps=steps)
    if not 0 <= steps < math.inf:
        raise ValueError(f"steps must be a finite number, 0 or more, got {steps}")
    if isinstance(step, Tensor):
        return torch.ones_like(step, dtype=torch.float32) if steps == 0 else (step / steps).clamp(0, 1)
    return 1.0 if steps == 0 else min(1.0, max(0.0, step / steps))


def _between(start: float | Tensor, end: float | Tensor, part: float | Tensor) -> float | Tensor:
    """Both terms are exact at the ends, which start + part (end - start) is not."""
    _check(start=start, end=end)
    return start * (1 - part) + end * part


def _check(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, (Real, Tensor)):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")


def _check_single(**values: float | Tensor) -> None:
    _check(**values)
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must have one value, got {tuple(value.shape)}")
