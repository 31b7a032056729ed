"""diffusers' AutoencoderKL as encoder and decoder: `--model autoencoder-kl` and its --model-config."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkl.vae.data.arrays import first_line
from fastkl.vae.errors import UserError, check_sides, require
from fastkl.vae.settings import AUTOENCODER, Settings

LIKELIHOODS = ("laplace", "normal", "huber", "logistic")  # the decoder's output is the mean of these
FROM = "_name_or_path"  # diffusers' name of the folder whose weights a model starts from


class Encoder(nn.Module):
    """Images in the numbers of the run -> the packed head [N, 2 * latent, h, w]. The network sees them in [-1, 1]."""

    def __init__(self, network: nn.Module, head: nn.Module | None, signed: tuple[float, float]):
        super().__init__()
        self.network, self.head, self.signed = network, head or nn.Identity(), signed

    def forward(self, x: Tensor) -> Tensor:
        slope, shift = self.signed
        return self.head(self.network(slope * x + shift))

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.network, "down_blocks")


class Decoder(nn.Module):
    """Latents [N, latent, h, w] -> images in the numbers of the run, from those of the network in [-1, 1]."""

    def __init__(self, network: nn.Module, head: nn.Module | None, signed: tuple[float, float]):
        super().__init__()
        # The network last, because its last layer is the decoder's (adversarial.py).
        self.head, self.network, self.signed = head or nn.Identity(), network, signed

    def forward(self, z: Tensor) -> Tensor:
        slope, shift = self.signed
        return (self.network(self.head(z)).float() - shift) / slope

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.network, "up_blocks")


def blocks_of(network: nn.Module, name: str) -> list[nn.Module]:
    """The blocks of diffusers' encoder or decoder, which hold all but a few of its parameters."""
    blocks: Any = getattr(network, name)
    return [*blocks, network.get_submodule("mid_block")]


def with_config(given: dict[str, Any]) -> dict[str, Any]:
    """The given options with --model-config as one JSON object, and the options that it determines.

    Raises:
        UserError: the file or a part of the option cannot be read, or contradicts another option.
    """
    if not given.get("model_config"):
        return given
    config = read_config(given["model_config"])
    widths = config.get("block_out_channels")
    whole = isinstance(widths, list) and all(isinstance(width, int) and width > 0 for width in widths)
    if widths is not None and not (whole and len(widths) > 1):
        expected = "two or more whole numbers from 1, such as 64,128"
        raise UserError(f"--model-config: block_out_channels must be a list of {expected}; got {widths!r}")
    told = {"latent": config.get("latent_channels")}
    if widths:
        told.update(hidden=widths[0], layers=len(widths) - 1)
    for name, value in told.items():
        if value is not None and given.get(name, value) != value:
            raise UserError(f"--{name} {given[name]} differs from the {value} of --model-config: leave out --{name}")
    told = {name: value for name, value in told.items() if value is not None}
    return {**given, **told, "model_config": json.dumps(config, sort_keys=True)}


def read_config(text: str) -> dict[str, Any]:
    """The fields in lines of --model-config, of which each is key=value, a .json file, or a folder written by
    save_pretrained. A later line takes precedence. The text may also be a JSON object."""
    if text.startswith("{"):
        return parse(text, "the object")
    config: dict[str, Any] = {}
    for line in filter(None, text.splitlines()):
        name, equals, value = line.partition("=")
        if equals and not Path(line).exists():
            config[name.strip()] = field(value.strip())
            continue
        path = Path(line)
        folder = path.is_dir()
        try:
            held = parse((path / "config.json" if folder else path).read_text(encoding="utf-8"), line)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"--model-config {line}: expected key=value, a .json file or a folder ({reason})") from None
        kind = held.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise UserError(f"--model-config {line}: expected the config of an AutoencoderKL, got that of {kind}")
        config.update({name: value for name, value in held.items() if not name.startswith("_")})
        if folder:
            config[FROM] = str(path.resolve())
    return config


def parse(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text; `where` names its source in errors."""
    try:
        held = json.loads(text)
    except ValueError as error:
        raise UserError(f"--model-config {where}: not valid JSON ({first_line(error)})") from None
    if not isinstance(held, dict):
        raise UserError(f"--model-config {where}: expected an object with fields by name")
    return held


def field(value: str) -> Any:
    """A value of key=value: JSON, numbers with commas between them, or else a string."""
    for text in (value, f"[{value}]") if "," in value else (value,):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return value


def config_of(settings: Settings, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of AutoencoderKL for images of this shape.

    Raises:
        UserError: the data are not images, or a field is unknown or does not fit them.
    """
    if len(shape) != 3:
        raise UserError(f"--model {AUTOENCODER} needs images, but a datum has shape {tuple(shape)}; use --model mlp")
    given = json.loads(settings.model_config) if settings.model_config else {}
    given.pop(FROM, None)
    known = list(inspect.signature(autoencoder_kl().__init__).parameters)[1:]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--model-config: AutoencoderKL has no field {name}{hint}")
    for name in ("in_channels", "out_channels"):
        if given.get(name, shape[0]) != shape[0]:
            raise UserError(f"--model-config: {name} is {given[name]}, but the images have {shape[0]} channels")
    widths = given.get("block_out_channels") or [settings.hidden, *[2 * settings.hidden] * settings.layers]
    check_sides(len(widths) - 1, shape)
    usual = {
        "in_channels": shape[0], "out_channels": shape[0], "latent_channels": settings.latent, "sample_size": shape[1],
        "block_out_channels": widths, "norm_num_groups": math.gcd(8, *widths), "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }  # fmt: skip
    return {**usual, **given}


def autoencoder_kl() -> Any:
    """diffusers' class."""
    return require("diffusers", f"--model {AUTOENCODER}").AutoencoderKL


def made(config: dict[str, Any]) -> Any:
    """An AutoencoderKL with these fields."""
    try:
        return autoencoder_kl()(**config)
    except Exception as error:  # diffusers checks few of the fields: the networks may raise any
        raise UserError(f"--model-config: AutoencoderKL cannot be made of it ({first_line(error)})") from None


def networks(
    settings: Settings, shape: tuple[int, ...], signed: tuple[float, float]
) -> tuple[nn.Module, nn.Module, tuple]:
    """(encoder, decoder, shape of the latent)."""
    model = made(config_of(settings, shape))
    if settings.activation_checkpointing:
        model.enable_gradient_checkpointing()
    encoder = Encoder(model.encoder, model.quant_conv, signed)
    decoder = Decoder(model.decoder, model.post_quant_conv, signed)
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    return encoder, decoder, (model.config.latent_channels, shape[1] // factor, shape[2] // factor)
