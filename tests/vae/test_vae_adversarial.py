"""`--adversarial`: the discriminator of image patches, and the weight that balances it with the reconstruction."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from fastkl.vae import adversarial, checkpoint
from fastkl.vae.adversarial import LastLayer, PatchDiscriminator, adaptive_weight
from fastkl.vae.errors import UserError
from fastkl.vae.model import build
from fastkl.vae.objective import Noise, Objective, Weights
from fastkl.vae.rules import resolve

from vae_helpers import BARE, SMALL, assert_same, refused, torchrun, train

CONV = ("--model", "conv", "--layers", "1", "--likelihood", "laplace", *BARE)
PATCHES = (*CONV, "--adversarial", "--schedule", "constant", "--learning-rate", "0.02", "--log-every", "1",
           "--batch-size", "8", "--test-count", "20")  # fmt: skip
WEIGHTS = Weights(*torch.ones(3))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("side", "patches"), [(8, 2), (16, 2), (32, 2), (64, 6), (256, 30)])
def test_scores_of_patches_are_those_of_the_image_alone(side, patches):
    """30 x 30 patches of 256 x 256 pixels, as in the paper. Other images of the batch, and so its split over processes,
    do not change a score: there is no batch norm."""
    torch.manual_seed(0)
    scores = PatchDiscriminator((3, side, side), hidden=8)
    x = draw(3, 3, side, side)
    with torch.no_grad():
        assert scores(x).shape == (3, 1, patches, patches)
        torch.testing.assert_close(scores(x)[:1], scores(x[:1]))
    assert not [module for module in scores.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_a_score_sees_70_pixels():
    scores = PatchDiscriminator((1, 256, 256), hidden=8)
    x = draw(1, 1, 256, 256).requires_grad_()
    for module in scores:
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # whose mean and deviation are of the whole image
    (gradient,) = torch.autograd.grad(scores(x)[0, 0, 15, 15], x)
    rows = gradient[0, 0].abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize(
    ("of_reconstruction", "of_adversary", "expected"),
    [(3.0, 2.0, 1.5), (1.0, 0.0, 1e4), (1e30, 1e-30, 1e4), (0.0, 0.0, 0.0), (math.nan, 1.0, 0.0),
     (1.0, math.nan, 0.0), (1.0, math.inf, 0.0), (math.inf, math.inf, 0.0)],
)  # fmt: skip
def test_the_weight_is_finite_whatever_the_gradients(of_reconstruction, of_adversary, expected):
    assert adaptive_weight(torch.tensor(of_reconstruction), torch.tensor(of_adversary)).item() == expected


class Little(nn.Module):
    """A decoder whose output is scaled after its last layer, as that of AutoencoderKL."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, z):
        return (self.body(z).float() - 0.1) / 0.5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_gradient_norms_are_those_of_float64_under_autocast(dtype):
    """A sum over pixels is large, a mean over patches small: in float16 the weight's own gradient is infinite or 0."""
    torch.manual_seed(0)
    decoder, z, x = Little(), draw(2, 2, 64, 64, seed=1), draw(2, 3, 64, 64, seed=2)
    losses = (lambda out: 40 * (out - x.to(out)).abs().sum(), lambda out: 1e-9 * (out**2).mean())
    exact = []
    for loss in losses:
        double = Little().double()
        double.load_state_dict(decoder.state_dict())
        exact.append(torch.autograd.grad(loss(double(z.double())), double.body[2].weight)[0].norm().item())
    last = LastLayer(decoder)
    assert last.module is decoder.body[2]
    with torch.autocast("cpu", dtype, enabled=dtype is not None), last.watched() as call:
        output = decoder(z)
        found = [last.gradient_norm(loss(output), output, call, None).item() for loss in losses]
        plain = [torch.autograd.grad(loss(output), last.module.weight, retain_graph=True)[0].norm().item()
                 for loss in losses]  # fmt: skip
    assert found == pytest.approx(exact, rel=1e-5 if dtype is None else 2e-2)
    if dtype == torch.float16:
        assert not math.isfinite(plain[0])
        assert plain[1] == 0
    assert call == [], "nothing is kept after the step"


def made(**given):
    torch.manual_seed(0)
    given = {"model": "conv", "layers": 1, "hidden": 8, "latent": 2, "likelihood": "laplace", **given}
    settings = resolve({"adversarial": True, **given})
    return Objective(build(settings, (1, 8, 8), "laplace"), settings, 10)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_adversary_has_its_share_of_the_last_layers_gradient(share):
    objective, x = made(adversarial_weight=share), draw(4, 1, 8, 8)
    weight = objective.last_layer.module.weight
    both = []
    for playing in (False, True):
        torch.manual_seed(1)
        loss, terms, _ = objective(x, Noise(), WEIGHTS, False, playing)
        both.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
    assert (both[1] - both[0]).norm().item() == pytest.approx(share * both[0].norm().item(), rel=1e-4)
    assert set(terms) >= {"adversarial", "adversarial_weight", "discriminator", "accuracy"}


def test_the_discriminator_has_the_gradient_of_its_hinge_loss_alone():
    objective, x = made(), draw(4, 1, 8, 8)
    torch.manual_seed(1)
    loss, terms, _ = objective(x, Noise(), WEIGHTS, False, True)
    loss.backward()
    torch.manual_seed(1)
    with torch.no_grad():
        z, _ = objective.vae.posterior(x).rsample_kl()
        x_hat = objective.vae.decode(z)
    of_data, of_model = objective.discriminator(x), objective.discriminator(x_hat)
    own = 0.5 * (torch.clamp(1 - of_data, min=0).mean() + torch.clamp(1 + of_model, min=0).mean())
    assert terms["discriminator"].item() == pytest.approx(own.item(), rel=1e-5)
    wanted = torch.autograd.grad(own, list(objective.discriminator.parameters()))
    for parameter, gradient in zip(objective.discriminator.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_discriminator_learns(tmp_path):
    """Its weights move, and against a decoder that hardly learns it tells data from reconstructions."""
    options = ("--learning-rate", "0.0001", "--discriminator-learning-rate", "0.01", "--steps", "30")
    assert train(tmp_path / "run", *PATCHES, *options, "--batch-size", "16") == 0
    state = checkpoint.load(tmp_path / "run")
    accuracy = [value for _, value in state["history"]["terms/accuracy"]]
    assert sum(accuracy[:3]) / 3 < 0.65
    assert sum(accuracy[-5:]) / 5 > 0.8
    moments = [each["exp_avg"] for each in state["optimizers"]["discriminator"]["state"].values()]
    assert len(moments) == len(state["discriminator"])
    assert all(moment.abs().max() > 0 for moment in moments)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_before_its_start_it_costs_nothing(tmp_path, monkeypatch, precision):
    """No forward pass, and the numbers of a run without it."""
    called = []
    real = adversarial.PatchDiscriminator.forward
    monkeypatch.setattr(
        adversarial.PatchDiscriminator, "forward", lambda self, x: called.append(len(x)) or real(self, x)
    )
    # Of fp16, a scale at which no step is skipped.
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=16.0))
    options = ("--steps", "4", "--precision", precision)
    assert train(tmp_path / "with", *PATCHES, *options, "--adversarial-start", "3") == 0
    assert called == [8] * 3, "of the fourth step: reconstructions twice, and data"
    assert train(tmp_path / "without", *(word for word in PATCHES if word != "--adversarial"), *options) == 0
    first, second = (checkpoint.load(tmp_path / name)["history"] for name in ("with", "without"))
    assert first["train"][:3] == second["train"][:3]
    assert [step for step, _ in first["terms/accuracy"]] == [4]


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    """With the options that change what a step does."""
    options = (*PATCHES, "--adversarial-start", "2", "--precision", "bf16", "--accumulate", "2", "--clip", "9",
               "--ema", "0.9", "--activation-checkpointing")  # fmt: skip
    assert train(tmp_path / "whole", *options, "--steps", "8") == 0
    for steps, resumed in (("4", ()), ("8", ("--resume",))):
        assert train(tmp_path / "parts", *options, "--steps", steps, *resumed) == 0
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for name in ("model", "discriminator", "optimizers", "average"):
        assert_same(whole[name], parts[name])
    assert whole["history"]["train"] == parts["history"]["train"]
    assert whole["optimizers"]["discriminator"]["state"][0]["step"] == 6


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")
def test_two_processes_do_what_one_with_their_batch_does(tmp_path):
    """Also the norms of the gradients, of the whole batch and not of a process's part."""
    options = (*PATCHES, "--learning-rate", "0.001", "--noise", "datum", "--adversarial-start", "2", "--steps", "6")
    done = torchrun("--out", str(tmp_path / "two"), *SMALL, *options, "--batch-size", "16")
    assert done.returncode == 0, done.stderr
    assert train(tmp_path / "one", *options, "--batch-size", "32") == 0
    two, one = (checkpoint.load(tmp_path / name) for name in ("two", "one"))
    for name in ("train", "terms/adversarial_weight", "terms/discriminator", "terms/adversarial"):
        curves = [torch.tensor(state["history"][name], dtype=torch.float64) for state in (two, one)]
        torch.testing.assert_close(*curves, rtol=1e-4, atol=2e-5)
    for part in ("model", "discriminator"):
        for name, weights in one[part].items():
            torch.testing.assert_close(two[part][name], weights, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"objective": "iwae"}, "--adversarial belongs to --objective elbo"),
        ({"compile": True}, "--compile does not go with --adversarial"),
        ({"parallel": "fsdp"}, "--parallel fsdp does not go with --adversarial"),
        ({"adversarial_weight": -1.0}, "--adversarial-weight must be a finite number"),
        ({"adversarial": False, "adversarial_start": 3}, "--adversarial-start belongs to --adversarial"),
        ({"adversarial": False, "discriminator_learning_rate": 0.1}, "belongs to --objective aae or --adversarial"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(given, expected):
    with pytest.raises(UserError, match=expected):
        resolve({"adversarial": True, **given})


def test_data_and_models_that_do_not_fit_are_refused_by_name(tmp_path, capsys):
    assert "--adversarial-start 12 leaves none of the 12 steps" in refused(
        capsys, tmp_path, *PATCHES, "--adversarial-start", "12"
    )
    said = refused(capsys, tmp_path, "--model", "autoregressive", "--adversarial")
    assert "--adversarial needs decoded images, and --model autoregressive" in said
    with pytest.raises(UserError, match=r"images with sides of at least 8, but a datum has shape \[1, 4, 8\]"):
        PatchDiscriminator((1, 4, 8))
    with pytest.raises(UserError, match="needs a decoder whose last layer has weights"):
        LastLayer(nn.Flatten())
