"""torchrun: two processes with B data each do what one does with 2B."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastkl.vae import checkpoint, data, loop, parallel
from fastkl.vae import run as runs
from fastkl.vae.errors import UserError
from fastkl.vae.parallel import Ranks
from fastkl.vae.rules import resolve

from vae_helpers import BARE, SMALL, fork_each, refused, torchrun, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")


def test_two_processes_lose_what_one_with_their_batch_loses(tmp_path, capsys):
    """The noise follows the datum (--noise datum), so every step's loss is the same but for the order of sums.

    The two processes stop half way and resume, which tests resuming as well.
    """
    same = (*SMALL, "--schedule", "constant", "--log-every", "1", *BARE)
    two = (*same, "--noise", "datum", "--batch-size", "32")
    for done in (
        torchrun("--out", str(tmp_path / "two"), *two, "--steps", "6"),
        fork_each(tmp_path, {"two": (*two, "--steps", "12", "--resume")}),
    ):
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("training data") + done.stdout.count("continuing") == 1, "only one process speaks"
    assert train(tmp_path / "one", *same, "--noise", "datum", "--batch-size", "64") == 0
    two, one = (checkpoint.load(tmp_path / name) for name in ("two", "one"))
    assert [row[0] for row in two["history"]["train"]] == list(range(1, 13))
    losses = [torch.tensor(state["history"]["train"], dtype=torch.float64) for state in (two, one)]
    torch.testing.assert_close(*losses, rtol=2e-6, atol=1e-5)
    for name, weights in one["model"].items():
        # AdamW divides by the gradient's size, so rounding in a tiny gradient is a larger part of its step.
        torch.testing.assert_close(two["model"][name], weights, rtol=1e-3, atol=1e-4)
    # Other noise changes the losses, so the comparison above means something.
    assert train(tmp_path / "other", *same, "--batch-size", "64") == 0
    other = torch.tensor(checkpoint.load(tmp_path / "other")["history"]["train"], dtype=torch.float64)
    assert (other - losses[1]).abs().max() > 1e-3
    assert "began with 2 processes and now has 1" in refused(capsys, tmp_path / "two", "--resume")


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        ({"objective": "miwae", "groups": 2, "samples": 2, "model": "autoregressive"}, {"eps", "uniform"}),
        ({"prior": "gmm", "components": 3, "kl": "relaxed", "warm_up": 0}, {"eps", "gumbel"}),
        ({"objective": "info_vae", "prior": "vamp", "components": 3, "warm_up": 0}, {"eps", "prior"}),
    ],
)
def test_noise_does_not_depend_on_the_number_of_processes(given, drawn):
    settings = resolve({"hidden": 16, "latent": 3, "steps": 2, "noise": "datum", "batch_size": 8, **given})
    run = runs.start(settings, data.load(settings), Ranks(), Path())
    half = dataclasses.replace(settings, batch_size=4)
    shares = [loop.batch(dataclasses.replace(run, settings=half, ranks=Ranks(rank, 2))) for rank in range(2)]
    x, noise = loop.batch(run)
    assert torch.cat([part for part, _ in shares]).equal(x)
    for name, whole in noise._asdict().items():
        if name.startswith("prior"):
            continue
        assert (whole is not None) == (name in drawn), name
        if whole is not None:
            assert torch.cat([getattr(part, name) for _, part in shares]).equal(whole), name
    if "prior" in drawn:
        parts = [dataclasses.replace(run, settings=half, ranks=Ranks(rank, 2)) for rank in range(2)]
        ((_, noise),), *others = (loop.batches(part) for part in (run, *parts))
        whole = run.objective.prior_samples(run.prior, noise)
        assert torch.cat([run.objective.prior_samples(run.prior, own) for ((_, own),) in others]).equal(whole)
    if noise.uniform is not None:
        seen = run.vae.observed(x, noise.uniform)
        assert seen.unique().tolist() == [0, 1]
        assert abs((seen - x).mean()) < 0.1
        assert run.vae.observed(x, noise.uniform).equal(seen)


def test_a_process_takes_its_own_device_before_it_joins(monkeypatch):
    """NCCL sends by the current device; of a rank on several machines only its place on this one counts."""
    seen = []
    for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(f"device {device}"))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: seen.append(f"join by {backend}"))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    ranks = parallel.start()
    assert seen == ["device 1", "join by cpu:gloo,cuda:nccl"], "what lies on the CPU is sent, too"
    assert ranks == Ranks(5, 8, 1)
    assert runs.choose_device("auto", ranks) == runs.choose_device("cuda", ranks) == torch.device("cuda", 1)
    assert runs.choose_device("cpu", ranks) == torch.device("cpu")
    # More processes than devices: on the CPU only.
    monkeypatch.setenv("LOCAL_RANK", "3")
    ranks = parallel.start()
    assert seen[2:] == ["join by cpu:gloo,cuda:nccl"]
    with pytest.raises(
        UserError, match="process 4 of this machine has no CUDA device: there are 3, and each process needs one"
    ):
        runs.choose_device("auto", ranks)
    assert runs.choose_device("cpu", ranks) == torch.device("cpu")
