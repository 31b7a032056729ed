"""Training with weights that change over the run: beta, and the temperature of --kl relaxed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fastkl.vae import checkpoint, plan, prior
from fastkl.vae.errors import UserError
from fastkl.vae.objective import Objective
from fastkl.vae.rules import resolve, resume

from vae_helpers import BARE, train


def recorded(monkeypatch, folder, *options) -> tuple[list, list]:
    """(beta, tau, where they are, whether the prior was learned) of each step, and the step when the prior began."""
    seen, begun, real = [], [], Objective.forward

    def recording(self, x, noise, weights, learned, *more):
        beta, tau, _ = weights
        seen.append((beta.item(), tau.item(), (beta.data_ptr(), tau.data_ptr()), learned))
        return real(self, x, noise, weights, learned, *more)

    with monkeypatch.context() as patch:
        patch.setattr(prior, "initialise", lambda *given: begun.append(len(seen)))
        patch.setattr(Objective, "forward", recording)
        assert train(folder, *BARE, "--prior", "gmm", "--components", "3", "--warm-up", "4", *options) == 0
    return seen, begun


def test_beta_rises_to_its_weight_as_one_tensor(tmp_path, monkeypatch):
    seen, begun = recorded(monkeypatch, tmp_path / "linear", "--beta", "0.5")
    assert [beta for beta, _, _, _ in seen] == pytest.approx([0.125, 0.25, 0.375, *[0.5] * 9])
    assert len({places for _, _, places, _ in seen}) == 1, "filled in place: nothing to recompile"
    assert [learned for _, _, _, learned in seen] == [False] * 4 + [True] * 8
    assert begun == [4], "fitted once"
    seen, _ = recorded(monkeypatch, tmp_path / "cosine", "--beta-schedule", "cosine")
    half = [0.5 - 0.5 * math.cos(math.pi * part) for part in (0.25, 0.5, 0.75)]
    assert [beta for beta, _, _, _ in seen] == pytest.approx([*half, *[1.0] * 9])


TAUS = {
    "exponential": [2.0 * 0.125 ** (step / 7) for step in range(8)],
    "linear": [2.0 - 0.25 * step for step in range(8)],
    "cosine": [1.125 + 0.875 * math.cos(math.pi * step / 7) for step in range(8)],
}


@pytest.mark.parametrize("schedule", TAUS)
def test_tau_falls_from_where_the_prior_begins_to_the_end(tmp_path, monkeypatch, schedule):
    options = ("--kl", "relaxed", "--tau", "2", "--final-tau", "0.25", "--tau-schedule", schedule)
    seen, _ = recorded(monkeypatch, tmp_path / "run", *options)
    assert [tau for _, tau, _, _ in seen] == pytest.approx([2.0] * 4 + TAUS[schedule])
    assert len({places for _, _, places, _ in seen}) == 1, "filled in place: nothing to recompile"
    state = checkpoint.load(tmp_path / "run")
    assert {name: state["settings"][name] for name in ("tau", "final_tau", "tau_schedule")} == {
        "tau": 2.0, "final_tau": 0.25, "tau_schedule": schedule,
    }  # fmt: skip
    bracket = state["history"]["mixture"]
    assert [row[0] for row in bracket] == list(range(4, 13))
    assert [row[5] for row in bracket] == pytest.approx([2.0, *TAUS[schedule]]), "that of the step just done"
    level, _ = recorded(monkeypatch, tmp_path / "level", "--kl", "relaxed", "--tau", "0.5", "--final-tau", "0.5")
    assert [tau for _, tau, _, _ in level] == [0.5] * 12


def test_a_planned_temperature_fixes_the_length_of_the_run():
    given = {"prior": "gmm", "kl": "relaxed", "schedule": "constant", "steps": 600}
    annealed, level = (dataclasses.asdict(resolve({**given, "final_tau": final})) for final in (0.1, 1.0))
    with pytest.raises(UserError, match="--steps 700 differs from the run's 600"):
        resume(annealed, {"steps": 700})
    assert resume(level, {"steps": 700}).steps == 700


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"kl": "relaxed"}, "--kl belongs to --prior gmm or vamp or flow"),
        ({"prior": "flow", "kl": "relaxed"}, "--kl relaxed needs a mixture"),
        ({"prior": "gmm", "kl": "relaxed", "covariance": "full"}, "--covariance diag, spherical or tied, got full"),
        ({"prior": "gmm", "tau": 0.5}, "--tau belongs to --kl relaxed; this run has --kl mc"),
        ({"prior": "gmm", "kl": "upper", "final_tau": 0.5}, "--final-tau belongs to --kl relaxed; .* --kl upper"),
        ({"tau_schedule": "linear"}, "--tau-schedule belongs to --kl relaxed"),
        ({"prior": "gmm", "kl": "relaxed", "tau": 0.0}, "--tau must be a finite number above 0, got 0.0"),
        ({"prior": "gmm", "kl": "relaxed", "final_tau": -1.0}, "--final-tau must be a finite number above 0"),
        ({"prior": "gmm", "kl": "relaxed", "tau": math.nan}, "--tau must be a finite number above 0"),
        ({"prior": "gmm", "kl": "relaxed", "tau": 0.05}, "--final-tau 0.1 must not be above --tau 0.05"),
        ({"prior": "gmm", "kl": "relaxed", "tau": 0.1, "tau_schedule": "linear"}, "--tau-schedule has no effect"),
        ({"beta_schedule": "cosine"}, "--beta-schedule needs .* this run has --warm-up 0"),
    ],
)
def test_options_that_contradict_are_refused_by_name(given, expected):
    with pytest.raises(UserError, match=expected):
        resolve(given)


def test_the_learning_rate_rises_over_the_steps_that_are_asked_for():
    for schedule, fall in (
        ("constant", lambda step: 1.0),
        ("cosine", lambda step: (1 + math.cos(math.pi * step / 400)) / 2),
    ):
        settings = resolve({"schedule": schedule, "learning_rate_warm_up": 200})
        for step in (0, 50, 199, 300):
            found = plan.learning_rate(settings, step, 400, 0.5)
            assert found == pytest.approx(0.5 * min(1.0, (step + 1) / 200) * fall(step))
    assert plan.learning_rate(resolve({"schedule": "constant"}), 99, 400, 0.5) == 0.5, "by default over 100 steps"
