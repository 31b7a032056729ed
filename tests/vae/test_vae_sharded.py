"""--parallel fsdp: each process keeps a part of the model and writes its part of the checkpoints."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch

from fastkl.vae import checkpoint, load, sharded
from fastkl.vae.errors import UserError

from vae_helpers import BARE, assert_same_state, ranks, refused, train

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
COMMON = ("--hidden", "16", "--latent", "3", "--log-every", "1", "--schedule", "constant", *BARE)
COMMON += ("--checkpoint-every", "4")
FREE = (*COMMON, "--global-batch-size", "60", "--noise", "datum")
# They reach what sharding changes: the norm of gradients, the average, added batches, a prior that starts and its
# draws; recomputed layers and the best weights; 16-bit weights and a scaled loss.
CASES = {
    "options": ("--objective", "aae", "--prior", "gmm", "--components", "3", "--warm-up", "2", "--clip", "0.5", "--ema",
                "0.9", "--accumulate", "2"),
    "layers": ("--model", "conv", "--hidden", "8", "--layers", "1", "--likelihood", "normal", "--patience", "9",
               "--activation-checkpointing"),
    "half": ("--precision", "fp16", "--accumulate", "2"),
    "compiled": ("--compile", "--prior", "gmm", "--components", "3", "--warm-up", "2", "--accumulate", "2"),
}  # fmt: skip
STEPS = ("--steps", "11")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run of each case, the first on 2, 3, 1 and 2 processes in turn; and one in which a process is killed."""
    folder = tmp_path_factory.mktemp("sharded")

    def of(name: str, case: str, *more: str) -> tuple[str, ...]:
        return ("--out", str(folder / name), "--parallel", "fsdp", *FREE, *CASES[case], *more)

    starts = [(size, ("--resume", "--steps", stop)) for size, stop in ((3, "8"), (1, "9"), (2, "11"))]
    done = ranks(
        (2, of("options", "options", "--steps", "5")),
        *((size, of("options", "options", *more)) for size, more in starts),
        (2, of("layers", "layers", *STEPS)),
        (2, of("half", "half", *STEPS)),
        (2, of("compiled", "compiled", *STEPS)),
        ("2:6", of("killed", "half", *STEPS)),
        (2, of("killed", "half", *STEPS, "--resume")),
        (2, ("own", str(folder / "own"), "4")),
        (2, ("own", str(folder / "own"), "8")),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_run_has_the_curve_of_one_process(many, tmp_path, name):
    alone = [option for option in CASES[name] if option != "--compile"]
    assert train(tmp_path, *FREE, *alone, *STEPS) == 0
    found, expected = (checkpoint.load(folder) for folder in (many / name, tmp_path))
    curves = [torch.tensor(state["history"]["train"], dtype=torch.float64) for state in (found, expected)]
    half = {"rtol": 1e-4, "atol": 1e-3} if name == "half" else {"rtol": 5e-6, "atol": 2e-5}
    torch.testing.assert_close(*curves, **half)
    for part in ("model", "average", "discriminator"):
        torch.testing.assert_close(found[part], expected[part], rtol=2e-3, atol=1e-3)
    assert found["best"].get("step") == expected["best"].get("step")
    assert found["guard"] == expected["guard"]
    norms = [state["history"]["monitors/gradient_norm_total"] for state in (found, expected)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=2e-3, atol=1e-3)


def test_a_model_of_the_callers_is_sharded_and_has_the_trained_weights(many, tmp_path):
    done = ranks((1, ("own", str(tmp_path / "own"), "8")))
    assert done.returncode == 0, done.stderr
    found, expected = (checkpoint.load(folder / "own") for folder in (many, tmp_path))
    curves = [torch.tensor(state["history"]["train"], dtype=torch.float64) for state in (found, expected)]
    torch.testing.assert_close(*curves, rtol=5e-6, atol=2e-5)


def test_a_sharded_run_that_is_killed_goes_on_bit_for_bit(many):
    assert_same_state(many / "killed", many / "half")


def test_a_sharded_run_keeps_its_two_newest_checkpoints_and_loads_as_any_other(many):
    names = sorted(path.name for path in (many / "options" / "checkpoint").iterdir())
    assert names == ["step-11", "step-8"]
    state = checkpoint.load(many / "options")
    torch.testing.assert_close(dict(load(many / "options", weights="last").vae.state_dict()), state["model"])
    assert not any(hasattr(value, "to_local") for value in state["model"].values())
    shape = state["model"]["encoder.1.weight"].shape
    assert all(moments["exp_avg"].dim() for moments in state["optimizers"]["autoencoder"]["state"].values())
    assert state["optimizers"]["autoencoder"]["state"][0]["exp_avg"].shape == shape


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("damage", ["a part is missing", "no table of contents", "code", "code of torch"])
def test_a_damaged_sharded_checkpoint_is_refused(many, tmp_path, capsys, damage):
    folder, trap = tmp_path / "run", tmp_path / "trap"
    shutil.copytree(many / "options", folder)
    path = folder / "checkpoint" / "step-11"
    if damage == "a part is missing":
        (path / "__1_0.distcp").unlink()
    elif damage == "no table of contents":
        (path / ".metadata").unlink()
    elif damage == "code":
        (path / ".metadata").write_bytes(pickle.dumps(Trap(str(trap))))
    else:  # a name inside a module that is allowed
        call = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93\x8c"
        line = f"touch {trap}".encode()
        (path / ".metadata").write_bytes(call + bytes([len(line)]) + line + b"\x85R.")
    with pytest.raises(UserError, match="step-11"):
        load(folder)
    assert "step-11" in refused(capsys, folder, "--resume", "--steps", "20")
    assert not trap.exists(), "code from the checkpoint was run"


def test_what_a_killed_run_leaves_incomplete_is_removed(tmp_path, many):
    folder = tmp_path / "run"
    shutil.copytree(many / "options", folder)
    (folder / "checkpoint" / "step-16").mkdir()
    state = checkpoint.load(folder, whole=False)
    assert state["sharded"] == "checkpoint/step-11"
    writer = sharded.Shards.__new__(sharded.Shards)
    writer.folder = folder
    writer.clean(state)
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["step-11", "step-8"]
