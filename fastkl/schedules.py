"""Weights that change over a run: of the KL term (beta), its target (a capacity), or a relaxation's temperature (tau).

Every schedule is a function of the step and of nothing else, so a resumed run needs no state of it. A step that is a
number gives a float; a step that is a tensor gives a tensor on its device, made of torch ops: inside a compiled
training step the value changes without a recompilation, as it does when the float is filled into a tensor outside.

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
    """As `linear`, along half a cosine: level at both ends.

    >>> from fastkl import schedules
    >>> schedules.cosine(5, 0.0, 1.0, steps=20) < schedules.linear(5, 0.0, 1.0, steps=20)
    True
    """
    angle = math.pi * progress(step, steps)
    part = 0.5 - 0.5 * (torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle))
    return _between(start, end, part)


def exponential(step: float | Tensor, start: float, end: float, *, steps: float) -> float | Tensor:
    """start^(1 - p) end^p with p = step / steps up to `steps`, then `end`: equal factors in equal times, as a
    temperature is annealed.

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
        raise ValueError(f"an exponential schedule runs between values above 0, got start {start} and end {end}")
    part = progress(step, steps)
    return start ** (1 - part) * end**part


def sigmoid(
    step: float | Tensor, start: float, end: float, *, steps: float, steepness: float = 10.0
) -> float | Tensor:  # fmt: skip
    """As `linear`, along the logistic function: slow at both ends, steep in the middle.

    With p = step / steps and s(p) = 1 / (1 + exp(-steepness (p - 1/2))), the part of the way is
    (s(p) - s(0)) / (s(1) - s(0)), so that the ends are reached. Towards steepness 0 it becomes `linear`.

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
    # s is 1/2 + 1/2 tanh of half its argument. The middle's place is exactly halfway, so both ends are exactly reached.
    place = (progress(step, steps) - 0.5) * (0.5 * steepness)
    level = torch.tanh(place) if isinstance(place, Tensor) else math.tanh(place)
    part = 0.5 + 0.5 * (level / math.tanh(0.25 * steepness))
    return _between(start, end, part)


def cyclical(
    step: float | Tensor, start: float, end: float, *, steps: float, cycles: int = 4, ratio: float = 0.5
) -> float | Tensor:  # fmt: skip
    """`cycles` times over: from `start` to `end` within the first `ratio` of a cycle, then at `end` for the rest of it.
    After `steps`, which all cycles take together, it stays at `end`.

    Args:
        cycles: how many times the way begins anew; 1 or more.
        ratio: the part of a cycle that rises, in [0, 1]; with 0 there is no way, only the end.

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
    # Of whole numbers the remainder is exact: no cycle begins a step late because of rounding.
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
    """step / steps within [0, 1]; with no steps at all the end is reached at once."""
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
