"""The report's share of the loss in a step: bytes as counted by hand, and an eager loss that is the run's loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastkl
from fastkl.vae import data, memory
from fastkl.vae.errors import UserError
from fastkl.vae.objective import Noise, Weights, draws_of
from fastkl.vae.parallel import Ranks
from fastkl.vae.rules import resolve
from fastkl.vae.run import start

from vae_helpers import datasets  # noqa: F401  (reads the digits once)

CASES = {
    "standard": {},
    "beta": {"beta": 3.0, "likelihood": "normal"},
    "gmm": {"prior": "gmm", "components": 5, "samples": 2},
    "gmm, full": {"prior": "gmm", "components": 5, "covariance": "full"},
    "gmm, tied": {"prior": "gmm", "components": 5, "covariance": "tied"},
    "vamp": {"prior": "vamp", "components": 5, "likelihood": "poisson"},
    "iwae": {"objective": "iwae", "samples": 3},
    "iwae, gmm": {"objective": "iwae", "prior": "gmm", "components": 5},
}


def begun(**given):
    settings = resolve({"hidden": 16, "latent": 4, "device": "cpu", **given})
    run = start(settings, data.load(settings), Ranks(), Path("nowhere"))
    run.step = settings.warm_up
    return run


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_the_loss_of_the_run(name):
    """With the same noise."""
    run = begun(**CASES[name])
    assert memory.has_formula(run.settings, run.prior)
    torch.manual_seed(0)
    head = torch.randn(8, 8)
    draws = draws_of(run.settings, run.prior is not None)
    torch.manual_seed(1)
    noise = Noise(torch.randn(draws, 8, 4).transpose(0, 1))
    x = run.data.train[:8]
    one = torch.tensor(run.settings.beta)
    given = memory.Given(run.vae, x)
    q = fastkl.DiagonalNormal.from_packed(head, dim=1)
    log_likelihood = given.by(run.vae.observation.log_prob)
    expected = run.objective.of(q, run.prior, log_likelihood, noise, Weights(one, one, one)).loss
    prior = None if run.prior is None else memory.Fixed(run.prior)
    eager = given.by(memory.eager_likelihood(run.vae.observation))
    torch.manual_seed(1)
    torch.testing.assert_close(memory.formula(head, prior, eager, run.settings), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "given",
    [
        {"objective": "swae"},
        {"free_bits": 1.0},
        {"prior": "gmm", "kl": "upper"},
        {"objective": "iwae", "gradient": "dreg"},
        {"objective": "beta_vae", "capacity": 1.0},
    ],
)
def test_another_loss_has_no_eager_row(given):
    run = begun(**given)
    assert set(memory.shares(run)["rows"]) == {"step", "fastkl loss"}


def test_kept_bytes_are_those_counted_by_hand():
    run = begun(hidden=256, latent=16)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rows = memory.shares(run)["rows"]
    # Inputs of SiLU and Linear, z, the head, the logits and the seed of the noise; three tensors like the latent.
    assert rows["step"]["kept"] * memory.MIB == 64 * (8 * 256 + 16 + 32 + 64) * 4 + 8
    assert rows["fastkl loss"]["kept"] * memory.MIB == 8
    assert rows["eager loss"]["kept"] * memory.MIB == 3 * 64 * 16 * 4
    for row in rows.values():
        assert row["kept_share"] == pytest.approx(row["kept"] / rows["step"]["kept"])
        assert row["peak"] > 0
        assert row["time"] > 0
    assert torch.get_rng_state().equal(before)
    assert all(parameter.grad is None for parameter in run.objective.parameters())


def test_the_preset_of_a_large_mixture_has_a_loss_that_is_most_of_a_step():
    """Counted bytes, not times: the eager loss alone keeps several times as much as a whole step with fastkl."""
    run = begun(preset="large-mixture", hidden=256, latent=64)
    assert (run.settings.prior, run.settings.objective, run.settings.samples) == ("gmm", "iwae", 5)
    rows = memory.shares(run)["rows"]
    assert rows["eager loss"]["kept_share"] > 5
    assert rows["eager loss"]["peak_share"] > 10
    assert rows["fastkl loss"]["kept_share"] < 0.15
    assert resolve({"preset": "large-mixture", "prior": "standard"}).prior == "standard"


@pytest.mark.parametrize("written", ["", '{"traceEvents": [{'])
def test_a_profile_that_finds_no_room_is_said(monkeypatch, written):
    """torch reports no full disk; the file is then missing, or cut."""

    def full(profile, path):
        if written:
            Path(path).write_text(written)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    with pytest.raises(UserError, match="the profile of a step cannot be written, perhaps because the disk is full"):
        memory.peak_bytes(lambda: None, torch.device("cpu"))
