"""`--objective` and the remedies: every combination that makes sense trains, the others are refused by name."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkl import DiagonalNormal, schedules
from fastkl.vae import checkpoint, plan
from fastkl.vae.errors import UserError
from fastkl.vae.model import build
from fastkl.vae.objective import Objective, Weights
from fastkl.vae.rules import REFUSED, resolve
from fastkl.vae.settings import LEARNED, OBJECTIVES, Settings

from vae_helpers import BARE, SMALL, fork_each, refused, train

PRIORS = ("standard", *LEARNED)
SHORT = ("--steps", "8", "--checkpoint-every", "99")
LEARNING = ("--components", "3", "--warm-up", "3")
# What each objective logs beside reconstruction and KL.
WEIGHTED = {"bound", "effective_sample_size", "weight_entropy"}
TERMS = {
    "iwae": WEIGHTED, "miwae": WEIGHTED, "ciwae": WEIGHTED, "piwae": {*WEIGHTED, "encoder_bound"},
    "wae_mmd": {"mmd"}, "info_vae": {"mmd"}, "swae": {"sliced_wasserstein"}, "sinkhorn_ae": {"sinkhorn_divergence"},
    "aae": {"adversarial", "discriminator", "accuracy"}, "vade": {"kl_components"},
    "beta_tc_vae": {"mutual_information", "total_correlation", "dimension_wise_kl"},
}  # fmt: skip


def options_of(prior: str) -> tuple[str, ...]:
    components = LEARNING[:2] if prior in ("gmm", "vamp") else ()
    return () if prior == "standard" else ("--prior", prior, *components, *LEARNING[2:])


def makes_sense(objective: str, prior: str) -> bool:
    return prior not in REFUSED.get(objective, ((), ""))[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_with_every_prior_that_makes_sense(tmp_path, capsys, objective):
    for prior in PRIORS:
        options = ("--objective", objective, *options_of(prior))
        if not makes_sense(objective, prior):
            said = refused(capsys, tmp_path / prior, *options)
            assert f"--objective {objective} does not go with --prior {prior}: it" in said
            continue
        assert train(tmp_path / prior, *BARE, *options, *SHORT, "--log-every", "2") == 0
        state = checkpoint.load(tmp_path / prior)
        rows = np.array(state["history"]["train"])
        assert rows.shape == (4, 4)
        assert np.isfinite(rows).all()
        terms = {name.partition("/")[2]: curve for name, curve in state["history"].items() if name.startswith("terms/")}
        assert set(terms) == TERMS.get(objective, set())
        assert all(len(curve[-1]) == 2 and np.isfinite(curve).all() for curve in terms.values())
        optimizer = state["optimizers"]["autoencoder"]
        steps = [{int(optimizer["state"][index]["step"]) for index in group["params"]}
                 for group in optimizer["param_groups"]]  # fmt: skip
        assert steps == [{8}] if prior == "standard" else [{8}, {5}], "a learned prior's begin after the warm-up"
        assert set(state["optimizers"]) == {"autoencoder", *(("discriminator",) if objective == "aae" else ())}
        for name, group in (("autoencoder", 0 if prior == "standard" else 1), ("discriminator", 0)):
            if name in state["optimizers"]:
                assert learns(state["optimizers"][name], group), f"every parameter of {name} {group} has a gradient"


def learns(optimizer: dict, group: int) -> bool:
    moments = [optimizer["state"][index]["exp_avg"] for index in optimizer["param_groups"][group]["params"]]
    return bool(moments) and all(moment.abs().max() > 0 for moment in moments)


def test_the_page_says_what_is_refused():
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    for objective in OBJECTIVES:
        (row,) = re.findall(rf"^\| `{objective}` \|(.*)\|$", page, re.MULTILINE)
        cells = [cell.strip() for cell in row.split("|")]
        expected = ["yes" if makes_sense(objective, prior) else "no" for prior in PRIORS]
        assert cells[: len(PRIORS)] == expected, objective


def test_objectives_differ_and_options_reach_them(tmp_path):
    """Each option changes what is learned."""
    changes = {
        "elbo": ("--beta 0.5", "--free-bits 0.02", "--free-bits 0.05 --free-bits-per sample",
                 "--free-bits 0.02 --free-bits-per dimension", "--warm-up 6", "--warm-up 6 --beta-schedule sigmoid",
                 "--warm-up 6 --beta-schedule cyclical", "--warm-up 6 --beta-schedule cyclical --cycles 2",
                 "--warm-up 6 --balance 3"),
        "beta_vae": ("--beta 3", "--capacity 0.05", "--capacity 0.05 --capacity-steps 9"),
        "iwae": ("--samples 2", "--gradient stl", "--gradient dreg"),
        "miwae": ("--groups 2", "--samples 2"),
        "ciwae": ("--elbo-share 0.9",),
        "wae_mmd": ("--penalty 99", "--kernel rbf"),
        "info_vae": ("--alpha 0.5", "--penalty 99"),
        "swae": ("--projections 3", "--penalty 99"),
        "sinkhorn_ae": ("--blur 1", "--penalty 99"),
        "aae": ("--penalty 99", "--discriminator-learning-rate 0.1"),
        "beta_tc_vae": ("--beta 3", "--weights mws"),
    }  # fmt: skip
    learned = {}
    for objective, variants in changes.items():
        for options in ("", *variants):
            folder = tmp_path / f"{objective} {options}"
            assert train(folder, *BARE, "--objective", objective, *options.split(), *SHORT, "--steps", "6") == 0
            learned[folder.name] = torch.cat([t.flatten() for t in checkpoint.load(folder)["model"].values()])
    for (one, first), (other, second) in itertools.combinations(learned.items(), 2):
        assert not torch.equal(first, second), f"{one} and {other} learned the same"


@pytest.mark.parametrize("objective", ["aae", "iwae", "beta_tc_vae"])
def test_stopped_runs_go_on_bit_for_bit(tmp_path, objective):
    options = ("--objective", objective, "--schedule", "constant", *BARE)
    assert train(tmp_path / "whole", *options) == 0
    assert train(tmp_path / "parts", *options, "--steps", "5") == 0
    assert train(tmp_path / "parts", *options, "--resume") == 0
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for name, tensor in whole["model"].items():
        assert torch.equal(parts["model"][name], tensor), name
    for name, tensor in whole["discriminator"].items():
        assert torch.equal(parts["discriminator"][name], tensor), name
    assert bool(whole["discriminator"]) == (objective == "aae")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")
def test_two_processes_do_what_one_with_their_batch_does(tmp_path):
    """Distances and decompositions of the whole batch, and a discriminator that both processes train."""
    runs = {objective: (*SMALL, *BARE, "--objective", objective, "--schedule", "constant", "--log-every", "1",
                        "--noise", "datum", *options_of("vamp" if objective == "aae" else "standard"))
            for objective in ("wae_mmd", "beta_tc_vae", "aae")}  # fmt: skip
    done = fork_each(tmp_path / "two", {name: (*options, "--batch-size", "32") for name, options in runs.items()})
    assert done.returncode == 0, done.stderr
    for objective, options in runs.items():
        assert train(tmp_path / objective, *options, "--batch-size", "64") == 0
        two, one = (checkpoint.load(folder / objective) for folder in (tmp_path / "two", tmp_path))
        for name in ("train", *(f"terms/{term}" for term in TERMS[objective])):
            curves = [torch.tensor(state["history"][name], dtype=torch.float64) for state in (two, one)]
            torch.testing.assert_close(*curves, rtol=1e-5, atol=2e-5)
        assert learns(one["optimizers"]["autoencoder"], -1), "a prior by its draws, which the loop makes here"
        for part in ("model", "discriminator"):
            assert one[part].keys() == two[part].keys()
            for name, weights in one[part].items():
                torch.testing.assert_close(two[part][name], weights, rtol=1e-3, atol=1e-4)


def test_discriminator_has_its_own_step(tmp_path, monkeypatch):
    """Both optimisers step, on parameters of their own, and the discriminator's rate is its own."""
    stepped = []
    real = torch.optim.AdamW.step

    def step(self, *arguments):
        stepped.append((self.param_groups[0]["lr"], {id(p) for group in self.param_groups for p in group["params"]}))
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = ("--objective", "aae", "--discriminator-learning-rate", "0.03", "--schedule", "constant")
    assert train(tmp_path, *BARE, *options, "--steps", "2") == 0
    assert [rate for rate, _ in stepped] == pytest.approx([3e-5, 3e-4, 6e-5, 6e-4])
    assert not stepped[0][1] & stepped[1][1]


def test_metrics_and_pictures_tell_the_terms_and_what_was_watched(tmp_path):
    pytest.importorskip("matplotlib")
    options = ("--objective", "iwae", "--no-tensorboard", "--importance-samples", "5", "--batch-size", "256")
    assert train(tmp_path, *options) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["step"] for row in metrics["history"]["terms/effective_sample_size"]] == [3, 6, 9, 12]
    assert all(1 <= row["effective_sample_size"] <= 5 for row in metrics["history"]["terms/effective_sample_size"])
    for name in ("active_units", "mutual_information", "gradient_norm_encoder", "gradient_norm_total"):
        rows = metrics["history"][f"monitors/{name}"]
        assert all(math.isfinite(row[name]) for row in rows), name
    assert all(len(row["kl_per_dimension"]) == 3 for row in metrics["history"]["monitors/kl_per_dimension"])
    assert metrics["skipped_steps"] == 0
    assert (tmp_path / "pictures" / "objective_terms.png").stat().st_size > 10_000
    assert "<h2>Objective terms</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("beta", [1.0, 0.3, 49.0])
def test_balancing_ends_with_the_rise_of_beta(beta):
    settings = resolve({"balance": 2, "warm_up": 7, "latent": 4, "hidden": 16, "beta": beta})
    objective = Objective(build(settings, (5,), "normal"), settings, 10)
    q = DiagonalNormal(torch.arange(12.0).view(3, 4), torch.zeros(3, 4))
    balanced = []
    for step in (5, 6, 7):
        weights = Weights(*(torch.tensor(value) for value in (plan.kl_weight(settings, step), 1.0, 0.0)))
        balanced.append(not torch.allclose(objective.remedy(weights)(q, q.kl()), q.kl()))
    assert balanced == [True, False, False]


def test_capacity_rises_over_its_steps():
    settings = Settings(objective="beta_vae", capacity=8.0, capacity_steps=4)
    assert [plan.capacity(settings, step) for step in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]


def test_published_temperature_never_anneals():
    """A collection of VAEs takes the start for the least temperature, too, so that its Gumbel-Softmax stays where it
    began. Here a temperature that cannot fall is refused where a way down is asked for, and otherwise falls."""
    temperature = least = 0.5
    for batch in range(0, 100_000, 100):
        temperature = max(temperature * math.exp(-3e-5 * batch), least)
    assert temperature == 0.5
    settings = resolve({"prior": "gmm", "kl": "relaxed", "tau": 0.5, "final_tau": 0.1, "steps": 1500})
    assert plan.temperature(settings, 500, 1500) == 0.5
    assert plan.temperature(settings, 1499, 1500) == pytest.approx(0.1)
    assert schedules.exponential(1000, 0.5, 0.1, steps=2000) == pytest.approx(math.sqrt(0.05))
    with pytest.raises(UserError, match="--tau-schedule has no effect"):
        resolve({"prior": "gmm", "kl": "relaxed", "tau": 0.5, "final_tau": 0.5, "tau_schedule": "linear"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"objective": "iwae", "beta": 2.0}, "--beta belongs to --objective elbo or beta_vae"),
        ({"objective": "elbo", "gradient": "dreg"}, "--gradient belongs to --objective iwae or miwae"),
        ({"objective": "iwae", "groups": 2}, "--groups belongs to --objective miwae or piwae"),
        ({"objective": "elbo", "penalty": 2.0}, "--penalty belongs to --objective wae_mmd"),
        ({"objective": "swae", "kernel": "rbf"}, "--kernel belongs to --objective wae_mmd or info_vae"),
        ({"objective": "vade", "prior": "gmm", "kl": "upper"}, "--kl belongs to --objective elbo or beta_vae"),
        ({"objective": "elbo", "capacity": 2.0}, "--capacity belongs to --objective beta_vae"),
        ({"objective": "beta_vae", "capacity_steps": 2}, "--capacity-steps belongs to --capacity"),
        ({"free_bits_per": "sample"}, "--free-bits-per belongs to --free-bits"),
        ({"prior": "gmm", "free_bits": 1.0}, "--free-bits needs the KL of each dimension"),
        ({"prior": "gmm", "balance": 2}, "--balance needs the KL of each dimension"),
        ({"balance": 2}, "--balance acts .* this run has --warm-up 0"),
        ({"balance": 20, "warm_up": 5}, "--balance 20 is more than --latent 16"),
        ({"balance": 2, "warm_up": 5, "free_bits": 1.0}, "--balance and --free-bits exclude each other"),
        ({"cycles": 2, "warm_up": 5}, "--cycles belongs to --beta-schedule cyclical"),
        ({"samples": 2}, "--samples applies to --objective elbo or beta_vae with a learned --prior, or to"),
        ({"objective": "swae", "prior": "gmm", "samples": 2}, "--samples applies to --objective elbo or beta_vae"),
        (
            {"objective": "iwae", "warm_up": 9},
            "--warm-up raises .* --objective iwae with --prior standard uses neither",
        ),
        ({"objective": "info_vae", "alpha": 1.5}, "--alpha must be a share, at most 1, got 1.5"),
        ({"objective": "info_vae", "penalty": 0.5}, "--alpha plus --penalty of info_vae must be at least 1"),
        ({"objective": "ciwae", "elbo_share": 2.0}, "--elbo-share must be a share, at most 1"),
        ({"objective": "sinkhorn_ae", "blur": 0.0}, "--blur must be a finite number above 0"),
        ({"objective": "wae_mmd", "penalty": -1.0}, "--penalty must be a finite number, 0 or more"),
        ({"objective": "beta_vae", "capacity": math.inf}, "--capacity must be a finite number"),
        ({"bad_steps": 0}, "--bad-steps must be at least 1"),
    ],
)
def test_options_that_say_nothing_are_refused_by_name(given, expected):
    with pytest.raises(UserError, match=expected):
        resolve(given)
