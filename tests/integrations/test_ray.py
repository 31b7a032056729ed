"""Ray Train: a TorchTrainer's workers train one run together, also after the death of a worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkl.vae import checkpoint, loop, train

ray = pytest.importorskip("ray")
train_on_ray = pytest.importorskip("ray.train")
trainers = pytest.importorskip("ray.train.torch")

RUN = {"steps": 12, "hidden": 16, "latent": 3, "checkpoint_every": 5, "log_every": 1, "noise": "datum"}


def fit(config):
    """The function of the page docs/scaling.md. The worker of rank 1 kills itself once, in the middle of a step."""
    batch, marker = loop.batch, Path(config["out"] + ".killed")

    def dying(run):
        if run.step == 7 and run.ranks.rank == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(run)

    loop.batch = dying
    train(config["x"], out=config["out"], resume_if_begun=True, global_batch_size=32, **RUN)
    assert torch.distributed.is_initialized(), "the group is Ray's"


def test_workers_train_one_run_and_a_death_loses_nothing(tmp_path):
    x = np.random.default_rng(0).random((200, 1, 8, 8)).astype("float32")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        trainer = trainers.TorchTrainer(
            fit,
            train_loop_config={"x": x, "out": str(tmp_path / "ray")},
            scaling_config=train_on_ray.ScalingConfig(num_workers=2),
            run_config=train_on_ray.RunConfig(
                storage_path=str(tmp_path / "store"), failure_config=train_on_ray.FailureConfig(max_failures=1)
            ),
        )
        trainer.fit()
    finally:
        ray.shutdown()
    assert (tmp_path / "ray.killed").exists()
    train(x, out=tmp_path / "one", global_batch_size=32, **RUN)
    found, expected = (checkpoint.load(tmp_path / name) for name in ("ray", "one"))
    assert found["ranks"] == 2
    curves = [torch.tensor(state["history"]["train"], dtype=torch.float64) for state in (found, expected)]
    torch.testing.assert_close(*curves, rtol=5e-6, atol=1e-5)
