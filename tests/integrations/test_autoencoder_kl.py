"""`--model autoencoder-kl`: diffusers' AutoencoderKL in the training loop, and the folder that diffusers loads."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastkl import vae  # noqa: E402
from fastkl.vae import checkpoint  # noqa: E402
from fastkl.vae.cli import main  # noqa: E402
from fastkl.vae.errors import UserError  # noqa: E402
from fastkl.vae.parallel import layers_of  # noqa: E402

from vae_helpers import BARE, ranks  # noqa: E402

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 3, 8, 8)).astype(np.uint8)
SIGNED = torch.from_numpy(PIXELS).float() / 127.5 - 1  # as diffusers has them
TINY = {"layers_per_block": 1, "mid_block_add_attention": False}


def train(folder, data=PIXELS, **options):
    small = {"steps": 4, "hidden": 8, "latent": 3, "layers": 1, "batch_size": 8, "model_config": TINY, "threads": 1}
    return vae.train(data, out=folder, **{"model": "autoencoder-kl", "learning_rate": 1e-2, **small, **options})


@pytest.mark.parametrize("options", [{}, {"likelihood": "logistic"}, {"likelihood": "huber", "ema": 0.5}])
def test_the_written_folder_has_the_models_numbers(tmp_path, options):
    """Of images in [-1, 1], as diffusers has them, whatever the scaling of the run; with the average of --ema."""
    model = train(tmp_path / "run", **options)
    folder = diffusers.AutoencoderKL.from_pretrained(tmp_path / "run" / "autoencoder")
    with torch.no_grad():
        found = folder.encode(SIGNED).latent_dist
        expected = vae.load(tmp_path / "run").posterior(PIXELS)
        torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.logvar, expected.logvar, rtol=1e-6, atol=1e-6)
        decoded = folder.decode(found.mean).sample
    grey = torch.from_numpy(model.decode(found.mean).numpy())
    wanted = 127.5 * (decoded + 1)
    torch.testing.assert_close(grey, wanted.clamp(0, 255) if options.get("likelihood") == "logistic" else wanted)
    state = checkpoint.load(tmp_path / "run")
    last = state["model"]["encoder.head.weight"]
    assert torch.equal(folder.quant_conv.weight, last) == ("ema" not in options)


def test_scaled_latents_have_mean_0_and_deviation_1(tmp_path):
    """By the formulas of the pipelines of diffusers for this class. The latents are draws from the posteriors."""
    train(tmp_path / "run", steps=30)
    config = diffusers.AutoencoderKL.from_pretrained(tmp_path / "run" / "autoencoder").config
    x = vae.load(tmp_path / "run").scaling  # of the data that trained, 32 of these 40
    assert x.peak > 0
    trained = training_data(tmp_path / "run")
    q = vae.load(tmp_path / "run").posterior(trained)
    z = q.rsample(num_samples=20_000, seed=1).double()  # [L, N, C, h, w]
    mean, deviation = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    by_channel = ((z - mean) * config.scaling_factor / deviation).transpose(0, 2).flatten(1)  # SDXL
    torch.testing.assert_close(by_channel.mean(1), torch.zeros(3).double(), rtol=0, atol=3e-3)
    torch.testing.assert_close(by_channel.std(1), torch.ones(3).double(), rtol=3e-3, atol=0)
    together = (z - config.shift_factor) * config.scaling_factor  # SD 3, Flux
    assert abs(together.mean().item()) < 3e-3
    assert together.std().item() == pytest.approx(1, rel=3e-3)
    assert (config.scaling_factor * z).std().item() == pytest.approx(1, rel=3e-3)  # Stable Diffusion


def training_data(folder):
    from fastkl.vae import data, rules

    settings = rules.resume(checkpoint.load(folder)["settings"], {})
    source = data.load(settings, PIXELS)
    return source.scaling.undo(source.train).numpy().round().astype(np.uint8)


def test_the_head_is_not_copied_and_its_gradient_is_whole(tmp_path):
    model = train(tmp_path / "run").vae.requires_grad_(True)
    heads = []
    model.encoder.register_forward_hook(lambda module, inputs, output: heads.append(output))
    q = model.posterior(torch.randn(2, 3, 8, 8))
    assert heads[0].shape == (2, 6, 4, 4)
    assert q.mean.untyped_storage().data_ptr() == q.logvar.untyped_storage().data_ptr() == heads[0].data_ptr()
    q.kl().sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_fields_come_from_values_files_and_folders(tmp_path):
    first = train(tmp_path / "first", model_config="layers_per_block=2\nblock_out_channels=8,16\nact_fn=relu")
    written = json.loads((tmp_path / "first" / "autoencoder" / "config.json").read_text())
    assert (written["layers_per_block"], written["block_out_channels"], written["act_fn"]) == (2, [8, 16], "relu")
    assert (first.settings.hidden, first.settings.layers, first.latent_shape) == (8, 1, (3, 4, 4))
    path = tmp_path / "config.json"
    shutil.copy(tmp_path / "first" / "autoencoder" / "config.json", path)
    for layers, source in ((2, str(path)), (1, f"{path}\nlayers_per_block=1")):
        other = train(tmp_path / f"other {layers}", model_config=source, seed=1)
        assert other.vae.encoder.network.layers_per_block == layers
        assert not torch.equal(other.encode(PIXELS), first.encode(PIXELS)), "a config has no weights"


def test_a_folder_of_save_pretrained_is_the_start(tmp_path):
    """And is not read again by a resumed run, whose checkpoint has the weights."""
    first = train(tmp_path / "first", seed=1)
    moved = shutil.move(tmp_path / "first" / "autoencoder", tmp_path / "folder")
    options = {"model_config": str(moved), "learning_rate": 0.0, "schedule": "constant"}
    second = train(tmp_path / "second", **options, steps=1)
    torch.testing.assert_close(second.encode(PIXELS), first.encode(PIXELS), rtol=0, atol=0)
    shutil.rmtree(moved)
    third = vae.train(PIXELS, out=tmp_path / "second", resume=True, steps=2)
    assert third.step == 2
    torch.testing.assert_close(third.encode(PIXELS), first.encode(PIXELS), rtol=0, atol=0)


@pytest.mark.skipif(os.name != "posix", reason="needs resource limits")
def test_a_full_disk_keeps_the_old_folder_and_the_next_start_writes_it(tmp_path, capsys):
    import resource

    np.save(tmp_path / "x.npy", PIXELS)
    options = ["--out", str(tmp_path / "run"), "--no-report", "--no-tensorboard"]
    small = ["--hidden", "8", "--layers", "1", "--latent", "3", "--steps", "2", "--batch-size", "8"]
    chosen = ["train", "--data", str(tmp_path / "x.npy"), "--model", "autoencoder-kl", *small, *options]
    assert main(chosen) == 0
    weights = tmp_path / "run" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    (tmp_path / "run" / ".autoencoder.killed").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert main(["train", "--resume", *options]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "autoencoder cannot be written: " in error
    assert error.endswith("make room, then continue with --resume\n")
    assert weights.read_bytes() == before
    assert not list((tmp_path / "run").glob(".autoencoder.*")), "nothing is left, also of an earlier process"
    weights.unlink()
    assert main(["train", "--resume", *options]) == 0
    assert weights.read_bytes() == before


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    options = {
        "schedule": "constant",
        "precision": "bf16",
        "activation_checkpointing": True,
        "accumulate": 2,
        "ema": 0.9,
    }
    train(tmp_path / "whole", **options)
    train(tmp_path / "parts", **options, steps=2)
    vae.train(PIXELS, out=tmp_path / "parts", resume=True, steps=4)
    whole, parts = (checkpoint.load(tmp_path / name) for name in ("whole", "parts"))
    for name, tensor in whole["model"].items():
        assert torch.equal(parts["model"][name], tensor), name
    assert (tmp_path / "parts" / "autoencoder" / "config.json").exists()


def test_checkpoints_of_the_networks_do_not_change_gradients(tmp_path):
    gradients = []
    for name, kept in (("all", False), ("few", True)):
        model = train(tmp_path / name, activation_checkpointing=kept).vae.requires_grad_(True).train()
        assert model.encoder.network.gradient_checkpointing is kept
        x = torch.linspace(-1, 1, 2 * 192).view(2, 3, 8, 8)
        (model.posterior(x).kl().sum() + model.log_likelihood(model.posterior(x).mean, x).sum()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"model_config": "layers_per_blok=2"},
            "AutoencoderKL has no field layers_per_blok; did you mean layers_per_block",
        ),
        ({"model_config": "in_channels=1"}, "in_channels is 1, but the images have 3 channels"),
        ({"model_config": "latent_channels=4"}, "--latent 3 differs from the 4 of --model-config"),
        ({"model_config": "block_out_channels=8"}, "block_out_channels must be a list of two or more whole .* got 8"),
        ({"model_config": "block_out_channels=[8]"}, r"block_out_channels must be a list of two or more .* got \[8\]"),
        ({"model_config": "block_out_channels=8,-8"}, r"must be a list of two or more .* got \[8, -8\]"),
        ({"model_config": "norm_num_groups=7"}, "--model-config: AutoencoderKL cannot be made of it"),
        ({"model_config": "norm_num_groups=0"}, "--model-config: AutoencoderKL cannot be made of it"),
        ({"model_config": "nowhere.json"}, "--model-config nowhere.json: expected key=value, a .json file or a folder"),
        ({"layers": 4}, "--layers 4 needs sides divisible by 16, got 8 x 8"),
        ({"likelihood": "bernoulli"}, "needs --likelihood laplace, normal, huber or logistic, got bernoulli"),
        ({"data": PIXELS.reshape(40, -1)}, "--model autoencoder-kl needs images, but a datum has shape"),
        ({"model": "conv"}, "--model-config belongs to --model autoencoder-kl; this run has --model conv"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, options, expected):
    with pytest.raises(UserError, match=expected):
        train(tmp_path / "run", **options)


def test_a_folder_of_another_kind_or_without_weights_is_refused(tmp_path):
    train(tmp_path / "run", steps=1)
    folder = tmp_path / "run" / "autoencoder"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"--model-config .*autoencoder: weights cannot be read"):
        train(tmp_path / "other", model_config=str(folder))
    (folder / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(UserError, match="expected the config of an AutoencoderKL, got that of AutoencoderDC"):
        train(tmp_path / "other", model_config=str(folder))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_sharded_run_has_the_curve_of_one_process_and_writes_the_same_folder(tmp_path):
    """Both start with the weights of a folder, which a first run has written."""
    train(tmp_path / "first", steps=2)
    np.save(tmp_path / "x.npy", PIXELS)
    options = ("--data", str(tmp_path / "x.npy"), "--model", "autoencoder-kl", "--hidden", "8", "--layers", "1")
    options += ("--model-config", str(tmp_path / "first" / "autoencoder"), "--noise", "datum", "--steps", "4")
    options += ("--global-batch-size", "8", "--accumulate", "2", "--log-every", "1", "--schedule", "constant")
    options += ("--precision", "bf16", "--ema", "0.5", *BARE)
    done = ranks(
        (1, (*options, "--out", str(tmp_path / "one"))),
        (2, (*options, "--out", str(tmp_path / "two"), "--parallel", "fsdp")),
    )
    assert done.returncode == 0, done.stderr
    curves = [torch.tensor(checkpoint.load(tmp_path / name)["history"]["train"]) for name in ("two", "one")]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=0.02)
    found, expected = (
        diffusers.AutoencoderKL.from_pretrained(tmp_path / name / "autoencoder").state_dict() for name in ("two", "one")
    )
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3)
    held = diffusers.AutoencoderKL.from_pretrained(tmp_path / "first" / "autoencoder").state_dict()
    weight = "decoder.conv_in.weight"
    assert 0 < (found[weight] - held[weight]).abs().max() < 0.01, "the weights of the folder, and four steps"


def test_the_blocks_of_the_networks_are_gathered_one_at_a_time(tmp_path):
    networks = train(tmp_path / "run", steps=1).vae
    for network in (networks.encoder, networks.decoder):
        *blocks, rest = layers_of(network)
        assert rest is network
        held = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        assert held > 0.9 * sum(parameter.numel() for parameter in network.parameters())
