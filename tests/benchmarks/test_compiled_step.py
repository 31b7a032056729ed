"""Whole compiled steps: fastkl's are timed against the formulas only if their losses agree."""

import pytest
import torch

from bench import compiled_step
from bench.timing import Pace


@pytest.mark.parametrize("components", [0, 2])
def test_every_step_is_timed_against_the_compiled_formulas(monkeypatch, components):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: asked.append(options) or step)
    row = compiled_step.row_of((4, 3, components), Pace(1, 0.001, 0.1))
    assert len(asked) == 3
    assert row["formulas"] == 1.0
    for name in ("eager", "fastkl", "fastkl, names not checked"):
        assert row[name] > 0 < row[f"{name}, us"]


def test_what_does_not_match_is_not_timed(monkeypatch):
    monkeypatch.setattr(compiled_step, "ops", lambda *given: compiled_step.formulas(*given) * 1.001)
    with pytest.raises(AssertionError, match="not close"):
        compiled_step.row_of((4, 3, 2), Pace(1, 0.001, 0.1))
