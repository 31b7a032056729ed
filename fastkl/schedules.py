"""Weights that change over a run: of the KL term (beta), or the temperature of a relaxation (tau).

Every schedule is a function of the step and of nothing else, so a resumed run needs no state of it. A step that is a
number gives a float; a step that is a tensor gives a tensor on its device, made of torch ops: inside a compiled
training step the value changes without a recompilation, as it does when the float is filled into a tensor outside.

    beta = torch.ones(())                                       # once
    beta.fill_(schedules.linear(step, 0.0, 1.0, steps=500))     # every step: KL warm-up
    tau.fill_(schedules.exponential(step, 1.0, 0.1, steps=5000))  # every step: for fastkl.gumbel_softmax
"""

from __future__ import annotations

import math

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
    # Both terms are exact at the ends, which start + part * (end - start) is not.
    return start * (1 - part) + end * part


def cosine(step: float | Tensor, start: float, end: float, *, steps: float) -> float | Tensor:
    """As `linear`, along half a cosine: level at both ends.

    >>> from fastkl import schedules
    >>> schedules.cosine(5, 0.0, 1.0, steps=20) < schedules.linear(5, 0.0, 1.0, steps=20)
    True
    """
    angle = math.pi * progress(step, steps)
    part = 0.5 - 0.5 * (torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle))
    return start * (1 - part) + end * part


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
    if not (start > 0 and end > 0):
        raise ValueError(f"an exponential schedule runs between values above 0, got start {start} and end {end}")
    part = progress(step, steps)
    return start ** (1 - part) * end**part


def progress(step: float | Tensor, steps: float) -> float | Tensor:
    """step / steps within [0, 1]; with no steps at all the end is reached at once."""
    if not 0 <= steps < math.inf:
        raise ValueError(f"steps must be a finite number, 0 or more, got {steps}")
    if isinstance(step, Tensor):
        return torch.ones_like(step, dtype=torch.float32) if steps == 0 else (step / steps).clamp(0, 1)
    return 1.0 if steps == 0 else min(1.0, max(0.0, step / steps))
