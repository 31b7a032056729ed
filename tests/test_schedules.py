"""Schedules of beta and tau: their ends, their shape, and tensors that need no recompilation."""

from __future__ import annotations

import math

import pytest
import torch

from fastkl import schedules

SCHEDULES = (schedules.linear, schedules.cosine, schedules.exponential)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.1), (0.3, 0.7), (1e-3, 4.0)])
def test_ends_are_exact_and_the_way_is_monotone(schedule, start, end):
    values = [schedule(step, start, end, steps=7) for step in range(-1, 10)]
    assert values[:2] == [start, start]
    assert values[-3:] == [end, end, end]
    rising = values if end > start else values[::-1]
    assert rising == sorted(rising)
    assert len(set(values)) == 8


def test_values_between():
    assert schedules.linear(3, 2.0, 4.0, steps=6) == pytest.approx(3.0)
    assert schedules.cosine(1, 0.0, 1.0, steps=4) == pytest.approx(0.5 - math.cos(math.pi / 4) / 2)
    assert schedules.exponential(1, 1.0, 0.5, steps=3) == pytest.approx(0.5 ** (1 / 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_steps_is_the_end_at_once(schedule):
    assert schedule(0, 0.5, 2.0, steps=0) == 2.0
    assert schedule(torch.tensor(0), 0.5, 2.0, steps=0) == 2.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tensor_step_gives_the_same_without_recompiling(schedule):
    def loss(step):
        return 3 * schedule(step, 0.25, 2.0, steps=8)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    with torch.compiler.set_stance("default"):
        compiled(torch.tensor(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(12):
            value = compiled(torch.tensor(step))
            assert value.item() == pytest.approx(3 * schedule(step, 0.25, 2.0, steps=8), rel=1e-6)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_bad_steps_are_refused(bad):
    with pytest.raises(ValueError, match="steps must be a finite number"):
        schedules.linear(0, 0.0, 1.0, steps=bad)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, -1.0)])
def test_exponential_needs_positive_ends(start, end):
    with pytest.raises(ValueError, match="above 0"):
        schedules.exponential(0, start, end, steps=3)
