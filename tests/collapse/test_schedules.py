"""Schedules of beta and tau: their ends, their shape, and tensors that need no recompilation."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from fastkl import schedules

MONOTONE = (schedules.linear, schedules.cosine, schedules.exponential, schedules.sigmoid)
SCHEDULES = (*MONOTONE, schedules.cyclical)


@pytest.mark.parametrize("schedule", MONOTONE)
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
    low, here, high = (1 / (1 + math.exp(-6 * (p - 0.5))) for p in (0, 0.3, 1))
    assert schedules.sigmoid(3, 2.0, 4.0, steps=10, steepness=6) == pytest.approx(2 + 2 * (here - low) / (high - low))
    assert schedules.sigmoid(3, 0.0, 1.0, steps=10, steepness=1e-3) == pytest.approx(0.3, rel=1e-6)


def fu(step, steps, cycles, ratio):
    """Equations 6 and 7 of Fu et al. 2019, in fractions: no rounding, and t - 1 is our step."""
    cycle = Fraction(steps, cycles)
    place = (step % cycle) / cycle
    return 1.0 if step >= steps or place > ratio else float(place / Fraction(ratio))


# Cycles of a whole number of steps, of a broken one, of one step each, and one alone.
@pytest.mark.parametrize(
    ("steps", "cycles", "ratio"), [(24, 4, 0.5), (25, 3, 0.75), (49, 7, 1.0), (5, 5, 0.5), (9, 1, 0.5)]
)
@pytest.mark.parametrize("kind", [int, torch.tensor, float, lambda step: torch.tensor(float(step))])
def test_cycles_begin_when_the_paper_says(steps, cycles, ratio, kind):
    for step in range(steps + 3):
        value = schedules.cyclical(kind(step), 0.0, 1.0, steps=steps, cycles=cycles, ratio=ratio)
        assert float(value) == pytest.approx(fu(step, steps, cycles, ratio), abs=1e-6), step
    assert float(schedules.cyclical(kind(-1), 0.25, 1.0, steps=steps, cycles=cycles, ratio=ratio)) == 0.25


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_a_cycle_without_a_rise_is_at_its_end(kind):
    assert [float(schedules.cyclical(kind(step), 0.0, 2.0, steps=8, ratio=0)) for step in (-1, 0, 1, 9)] == [2.0] * 4


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


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (schedules.sigmoid, {"steepness": 0.0}),
        (schedules.sigmoid, {"steepness": math.inf}),
        (schedules.cyclical, {"cycles": 0}),
        (schedules.cyclical, {"cycles": 2.5}),
        (schedules.cyclical, {"ratio": 1.1}),
        (schedules.cyclical, {"ratio": math.nan}),
    ],
)
def test_bad_shapes_are_refused(schedule, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        schedule(0, 0.0, 1.0, steps=3, **options)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, -1.0)])
def test_exponential_needs_positive_ends(start, end):
    with pytest.raises(ValueError, match="above 0"):
        schedules.exponential(0, start, end, steps=3)


def test_a_fresh_process_has_them_as_an_attribute():
    command = "import fastkl; print(fastkl.schedules.linear(1, 0.0, 1.0, steps=2))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.5"
