"""The options of the loop: precision, accumulated gradients, clipping, averaged weights, compilation, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastkl.vae import checkpoint, load, loop
from fastkl.vae.guard import Diverged, Guard

from vae_helpers import BARE, assert_same_state, fork_each, interrupt, refused, train

OPTIONS = {
    "bf16": ("--precision", "bf16"),
    "fp16": ("--precision", "fp16"),
    "accumulate": ("--accumulate", "3", "--batch-size", "20"),
    "clip": ("--clip", "0.5"),
    "average": ("--ema", "0.9", "--prior", "gmm", "--components", "3", "--warm-up", "4"),
    "compile": ("--compile",),
    "patience": ("--patience", "20"),
    "activation checkpointing": ("--activation-checkpointing",),
    "all": (
        "--precision", "bf16", "--accumulate", "2", "--clip", "1", "--ema", "0.8", "--activation-checkpointing",
        "--objective", "aae", "--noise", "datum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_the_option_resumes_bit_for_bit(tmp_path, monkeypatch, name):
    options = (*BARE, *OPTIONS[name])
    assert train(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert train(tmp_path / "run", *options) == 130
    assert checkpoint.load(tmp_path / "run")["step"] == 5
    assert train(tmp_path / "run", *BARE, "--resume") == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def weights(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder)["model"]


def test_accumulated_batches_are_one_large_batch(tmp_path):
    common = (*BARE, "--noise", "datum")
    assert train(tmp_path / "parts", *common, "--batch-size", "16", "--accumulate", "4") == 0
    assert train(tmp_path / "whole", *common, "--batch-size", "64") == 0
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=1e-4, atol=1e-6)
    curves = [checkpoint.load(tmp_path / name)["history"]["train"] for name in ("parts", "whole")]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=1e-4)


def test_processes_exchange_gradients_once_a_step(tmp_path):
    """Two processes with two batches each do what one with four does."""
    common = ("--hidden", "16", "--latent", "3", "--steps", "12", "--log-every", "3", *BARE, "--noise", "datum")
    done = fork_each(tmp_path, {"two": (*common, "--batch-size", "16", "--accumulate", "2")})
    assert done.returncode == 0, done.stderr
    assert train(tmp_path / "one", *common, "--batch-size", "16", "--accumulate", "4") == 0
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-6)


def test_only_the_last_batch_of_a_step_exchanges_gradients(tmp_path, monkeypatch):
    kept, steps = [], []
    real = loop.update
    monkeypatch.setattr(
        "fastkl.vae.parallel.Ranks.without_exchange", lambda ranks, module: kept.append(1) or torch.enable_grad()
    )
    monkeypatch.setattr(loop, "update", lambda run, loss: steps.append(len(kept)) or real(run, loss))
    assert train(tmp_path, *BARE, "--accumulate", "3", "--batch-size", "20") == 0
    assert steps == list(range(2, 2 * 12 + 1, 2))


def test_the_clip_bounds_the_norm_of_all_gradients(tmp_path, monkeypatch):
    norms = []

    def watched(optimizer, *rest):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    hook = register_optimizer_step_pre_hook(watched)
    try:
        assert train(tmp_path / "free", *BARE) == 0
        free, norms[:] = list(norms), []
        assert train(tmp_path / "clipped", *BARE, "--clip", "0.5") == 0
    finally:
        hook.remove()
    assert min(free) > 0.5, "the test needs gradients to clip"
    assert norms == pytest.approx([0.5] * 12, rel=1e-4)


def test_tests_and_report_use_the_averaged_weights(tmp_path, monkeypatch):
    seen, steps, decay = [], [], 0.7
    real, update = loop.quick_elbo, loop.update

    def evaluated(vae, *rest):
        seen.append([parameter.detach().clone() for parameter in vae.parameters()])
        return real(vae, *rest)

    def updated(run, loss):
        good = update(run, loss)
        steps.append([parameter.detach().clone() for parameter in run.vae.parameters()])
        return good

    monkeypatch.setattr(loop, "quick_elbo", evaluated)
    monkeypatch.setattr(loop, "update", updated)
    assert train(tmp_path, *BARE, "--ema", str(decay)) == 0
    mean = steps[0]
    for current in steps[1:]:
        mean = [decay * old + (1 - decay) * new for old, new in zip(mean, current)]
    torch.testing.assert_close(seen[-1], mean)
    torch.testing.assert_close(list(weights(tmp_path).values()), steps[-1], rtol=0, atol=0)
    assert (seen[-1][0] - steps[-1][0]).abs().max() > 1e-4


def falling(monkeypatch, best: int) -> None:
    """The ELBO of held-out data rises up to this step, and falls after it."""
    monkeypatch.setattr(loop, "quick_elbo", lambda vae, *rest: (-abs(next(steps) - best), 0.0, 0.0))
    steps = iter(range(1, 100))


def test_patience_ends_a_run_and_keeps_its_best_weights(tmp_path, monkeypatch):
    seen, update = [], loop.update

    def updated(run, loss):
        good = update(run, loss)
        seen.append({name: value.clone() for name, value in run.vae.state_dict().items()})
        return good

    monkeypatch.setattr(loop, "update", updated)
    falling(monkeypatch, best=5)
    assert train(tmp_path, *BARE, "--patience", "3") == 0
    state = checkpoint.load(tmp_path)
    assert (state["step"], state["best"]["step"], state["best"]["elbo"]) == (8, 5, 0)
    torch.testing.assert_close(state["best"]["model"], seen[4], rtol=0, atol=0)
    torch.testing.assert_close(dict(load(tmp_path).vae.state_dict()), seen[4], rtol=0, atol=0)
    assert train(tmp_path, *BARE, "--resume") == 0, "it has ended"
    assert checkpoint.load(tmp_path)["step"] == 8


def test_patience_waits_for_a_learned_prior(tmp_path, monkeypatch):
    falling(monkeypatch, best=2)
    options = ("--patience", "3", "--prior", "gmm", "--components", "3", "--warm-up", "7")
    assert train(tmp_path, *BARE, *options) == 0
    state = checkpoint.load(tmp_path)
    assert (state["step"], state["best"]["step"]) == (10, 7)


def test_all_processes_end_together(tmp_path):
    options = ("--hidden", "16", "--latent", "3", "--steps", "40", "--learning-rate", "10", *BARE, "--patience", "2")
    done = fork_each(tmp_path, {"two": options})
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(tmp_path / "two")
    assert state["step"] < 40
    assert state["best"]["points"] == 2


def test_the_networks_run_in_the_precision_and_the_kl_in_float32(tmp_path, monkeypatch):
    seen = {}
    real = loop.backward

    def watched(run, weights):
        networks = {"encoder": run.vae.encoder, "decoder": run.vae.decoder}
        hooks = [
            network.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.dtype}))
            for name, network in networks.items()
        ]
        loss, terms, posterior = real(run, weights)
        for hook in hooks:  # tests of the run are in float32
            hook.remove()
        seen.update(loss=loss.dtype, kl=terms["kl"].dtype, weight=next(run.vae.parameters()).dtype)
        return loss, terms, posterior

    monkeypatch.setattr(loop, "backward", watched)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert train(tmp_path / precision, *BARE, "--precision", precision) == 0
        assert seen == {
            "encoder": dtype, "decoder": dtype, "loss": torch.float32, "kl": torch.float32, "weight": torch.float32
        }  # fmt: skip
    curves = [checkpoint.load(tmp_path / name)["history"]["train"][-1][1] for name in ("fp32", "bf16", "fp16")]
    assert curves[1:] == pytest.approx([curves[0]] * 2, rel=0.02)


def test_a_scale_that_is_too_large_for_float16_is_found(tmp_path, monkeypatch):
    """Twenty steps overflow before the scale fits; they are not taken for a divergence."""
    scales = []
    monkeypatch.setattr(loop, "train", large_scale(loop.train, scales))
    assert train(tmp_path, *BARE, "--precision", "fp16", "--steps", "40", "--bad-steps", "3") == 0
    state = checkpoint.load(tmp_path)
    assert scales == [2.0**36]
    assert state["scaler"]["scale"] < 2.0**20
    assert state["guard"] == {"skipped": 0, "in_a_row": 0}
    assert state["history"]["train"], "steps were taken"


def large_scale(train_loop, scales):
    def patched(run, display):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36)
        scales.append(run.scaler.get_scale())
        return train_loop(run, display)

    return patched


def test_a_true_divergence_in_float16_ends_the_run():
    guard, weight = Guard(patience=2), torch.ones(2, requires_grad=True)
    weight.grad = torch.tensor([float("nan"), 1.0])
    assert not guard.admit(torch.ones(()), [weight], scaled=True)
    assert guard.skipped == 0
    assert not guard.admit(torch.tensor(float("nan")), [weight], scaled=True)
    with pytest.raises(Diverged, match="a gradient was not finite 2 times"):
        guard.admit(torch.ones(()), [weight], scaled=False)


def test_activation_checkpointing_changes_no_number_and_keeps_less(tmp_path, monkeypatch):
    kept, real = [], loop.backward

    def counted(run, weights):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            found = real(run, weights)
        kept.append(sum(sizes))
        return found

    monkeypatch.setattr(loop, "backward", counted)
    common = (*BARE, "--model", "conv", "--hidden", "8", "--layers", "1", "--latent", "2", "--steps", "3")
    assert train(tmp_path / "plain", *common) == 0
    plain, kept[:] = kept[0], []
    assert train(tmp_path / "less", *common, "--activation-checkpointing") == 0
    assert_same_state(tmp_path / "plain", tmp_path / "less")
    assert kept[0] < 0.7 * plain, (kept[0], plain)


def test_a_compiled_run_is_the_same_run(tmp_path):
    common = (*BARE, "--noise", "datum")  # a compiled randint draws other seeds
    assert train(tmp_path / "eager", *common) == 0
    assert train(tmp_path / "compiled", *common, "--compile") == 0
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "eager"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ema", "1"), "--ema must be a decay, 0 or more and below 1, got 1.0"),
        (("--clip", "-1"), "--clip must be a finite number, 0 or more, got -1.0"),
        (("--accumulate", "0"), "--accumulate must be at least 1, got 0"),
        (("--accumulate", "900", "--batch-size", "2"), "--batch-size 2 with --accumulate 900 on 1 process is more"),
    ],
)
def test_refused_values(tmp_path, capsys, options, message):
    assert message in refused(capsys, tmp_path, *options)
