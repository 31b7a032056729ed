"""`python -m bench.integrations`: steps are timed both ways, and not if their losses differ."""

import torch

from bench import integrations


def test_a_step_is_timed_both_ways():
    row = integrations.measure(integrations.distributions()[0], 1, 1e-3)
    assert row.startswith("| distributions | KL of Independent(Normal), 32 x 8 | ")
    library, with_fastkl, ratio = (float(word) for word in row.split(" | ")[2].replace("=", "/").split(" / "))
    assert min(library, with_fastkl, ratio) > 0


def test_losses_that_differ_are_not_timed():
    values = iter(range(10**9))
    case = integrations.Case(
        "distributions", "a step of another loss each time", lambda: torch.tensor(float(next(values)))
    )
    assert "losses differ" in integrations.measure(case, 1, 0.0)
