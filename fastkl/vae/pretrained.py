"""Folders of diffusers' AutoencoderKL: the one with whose weights a run starts, and the one that it writes."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.vae.autoencoder import FROM, Decoder, Encoder, autoencoder_kl, config_of, made
from fastkl.vae.data.arrays import first_line
from fastkl.vae.errors import UserError
from fastkl.vae.model import VAE
from fastkl.vae.parallel import load_whole
from fastkl.vae.run import Run
from fastkl.vae.settings import Settings

FOLDER = "autoencoder"
WATCHED = 1000  # training data whose latents give mean and deviation


def assembled(vae: VAE, config: dict[str, Any]) -> Any:
    """An AutoencoderKL of the VAE's own modules."""
    model = made(config)
    encoder, decoder = vae.encoder, vae.decoder
    assert isinstance(encoder, Encoder), "the run has --model autoencoder-kl"
    assert isinstance(decoder, Decoder)
    model.encoder, model.decoder = encoder.network, decoder.network
    for name, part in (("quant_conv", encoder), ("post_quant_conv", decoder)):
        if not isinstance(part.head, nn.Identity):
            setattr(model, name, part.head)
    return model


def load_pretrained(vae: VAE, settings: Settings) -> None:
    """Load the weights of the folder that --model-config names, if it names one.

    Raises:
        UserError: the folder holds no weights, or its weights do not fit its config.
    """
    folder = json.loads(settings.model_config or "{}").get(FROM)
    if folder is None:
        return
    try:
        held = autoencoder_kl().from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        load_whole(assembled(vae, config_of(settings, vae.shape)), held.state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--model-config {folder}: weights cannot be read ({first_line(error)})") from None


@torch.no_grad()
def moments(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and deviation of the latents of training data: of each channel, and of all together.

    The latents are draws from the posteriors, on which diffusion is trained. Their variance is computed as Var(mean) +
    E[variance], without draws.
    """
    first, second = [], []
    for part in run.data.train[:WATCHED].split(max(1, run.settings.batch_size)):
        q = run.vae.posterior(part.to(run.device))
        mean, variance = q.mean.double(), q.logvar.double().exp()
        first.append(mean.flatten(2).mean(2).cpu())
        second.append((mean.square() + variance).flatten(2).mean(2).cpu())
    mean, square = torch.cat(first).mean(0), torch.cat(second).mean(0)
    deviation, whole = (square - mean.square()).sqrt(), (square.mean() - mean.mean().square()).sqrt()
    return mean, deviation, mean.mean(), whole


def save(run: Run) -> Path:
    """Write RUN/autoencoder by save_pretrained, with the present weights, and return the folder.

    The scaled latents (z - latents_mean) * scaling_factor / latents_std, as SDXL's pipelines compute them, have mean 0
    and deviation 1 in each channel. z * scaling_factor, as Stable Diffusion's compute them, has deviation 1 over all
    channels, and with shift_factor, as SD 3's and Flux's, also mean 0. So latents_std is in units of that deviation.

    Raises:
        UserError: the folder cannot be written; an old one is unchanged.
    """
    target = run.folder / FOLDER
    for leftover in run.folder.glob(f".{FOLDER}.*"):  # of a process killed during a write
        shutil.rmtree(leftover, ignore_errors=True)
    mean, deviation, shift, whole = moments(run)
    model = assembled(run.vae, config_of(run.settings, run.vae.shape))
    model.register_to_config(
        latents_mean=mean.tolist(), latents_std=(deviation / whole).tolist(),
        scaling_factor=1 / whole.item(), shift_factor=shift.item(),
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(dir=run.folder, prefix=f".{FOLDER}.") as temporary:
            written = Path(temporary) / FOLDER
            model.save_pretrained(written)
            if target.exists():
                target.rename(Path(temporary) / "old")
            written.rename(target)
    except Exception as error:  # safetensors has a class of its own for a full disk
        raise UserError(
            f"{target} cannot be written: {first_line(error)}; the checkpoint has the weights: make room, then "
            "continue with --resume"
        ) from None
    return target
