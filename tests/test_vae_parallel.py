"""torchrun: two processes with B data each do what one does with 2B."""

from __future__ import annotations

import pytest
import torch

from fastkl.vae import checkpoint

from vae_helpers import BARE, SMALL, refused, torchrun, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")


def test_two_processes_lose_what_one_with_their_batch_loses(tmp_path, capsys):
    """The noise follows the datum (--noise datum), so every step's loss is the same but for the order of sums.

    The two processes stop half way and go on, so their resumed run is proved as well.
    """
    same = (*SMALL, "--schedule", "constant", "--log-every", "1", *BARE)
    for more in (("--steps", "6"), ("--steps", "12", "--resume")):
        done = torchrun("--out", str(tmp_path / "two"), *same, "--noise", "datum", "--batch-size", "32", *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("training data") + done.stdout.count("going on") == 1, "only one process speaks"
    assert train(tmp_path / "one", *same, "--noise", "datum", "--batch-size", "64") == 0
    two, one = (checkpoint.load(tmp_path / name) for name in ("two", "one"))
    assert [row[0] for row in two["history"]["train"]] == list(range(1, 13))
    losses = [torch.tensor(state["history"]["train"], dtype=torch.float64) for state in (two, one)]
    torch.testing.assert_close(*losses, rtol=2e-6, atol=1e-5)
    for name, weights in one["model"].items():
        # AdamW divides by the gradient's size, so rounding in a tiny gradient is a larger part of its step.
        torch.testing.assert_close(two["model"][name], weights, rtol=1e-3, atol=1e-4)
    # Other noise is seen in the losses, or the above would prove little.
    assert train(tmp_path / "other", *same, "--batch-size", "64") == 0
    other = torch.tensor(checkpoint.load(tmp_path / "other")["history"]["train"], dtype=torch.float64)
    assert (other - losses[1]).abs().max() > 1e-3
    assert "began with 2 processes, now there are 1" in refused(capsys, tmp_path / "two", "--resume")
