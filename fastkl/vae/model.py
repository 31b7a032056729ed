"""Encoder and decoder. The encoder's last layer gives mean and log-variance as one packed head, used without a copy."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl.priors import Prior
from fastkl.vae import autoencoder
from fastkl.vae.autoregressive import MaskedDecoder
from fastkl.vae.data.scaling import Scaling
from fastkl.vae.errors import UserError, check_sides
from fastkl.vae.likelihood import Normal, make
from fastkl.vae.settings import AUTOENCODER, Settings

# Values of x per chunk, encoded and decoded. They bound the memory of large images and of 1,000 samples.
ENCODED, DECODED = 2**17, 2**20
OWN = "own"  # the name of a model that is given as an object


class VAE(nn.Module):
    """x [N, *shape] -> posterior over z [N, *latent_shape] -> log p(x | z) [N], in nats."""

    prior: Prior | None

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, shape: tuple, latent_shape: tuple, likelihood: str,
        levels: int = 256, scale: float = 0.0,
    ) -> None:  # fmt: skip
        """`likelihood`: a name of likelihood.py; `levels`: of the pixels of a discrete one; `scale`: of errors, or 0
        to learn it."""
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_module("prior", None)  # None is N(0, I); a learned prior starts after the warm-up (prior.py)
        self.shape, self.latent_shape, self.likelihood = tuple(shape), tuple(latent_shape), likelihood
        self.activation_checkpointing = False
        self.signed = (1.0, 0.0)  # (a, b): a x + b are images in [-1, 1]
        self.levels, self.observation = levels, make(likelihood, self.shape, levels, scale)

    def posterior(self, x: Tensor) -> fastkl.DiagonalNormal:
        """q(z | x), views of the packed head [N, 2 * latent, ...]."""
        return fastkl.DiagonalNormal.from_packed(self.through(self.encoder, self.observation.seen(x)), dim=1)

    def through(self, network: nn.Module, x: Tensor) -> Tensor:
        """network(x); with activation checkpointing only the inputs of its layers are kept for the backward pass."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return network(x)
        for layer in network if isinstance(network, nn.Sequential) else [network]:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    @property
    def autoregressive(self) -> bool:
        """Whether the decoder reads the datum that it predicts."""
        return isinstance(self.decoder, MaskedDecoder)

    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """The likelihood's parameters [..., *shape], such as logits or means, for z [..., *latent_shape]; only an
        autoregressive decoder reads x. With several outputs for each value they are [..., outputs, *shape]."""
        if self.autoregressive:
            return self.decoder(z, x)
        leading = z.shape[: z.dim() - len(self.latent_shape)]
        return self.through(self.decoder, z.reshape(-1, *self.latent_shape)).reshape(*leading, *self.output_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        outputs = self.observation.outputs
        return self.shape if outputs == 1 else (outputs, *self.shape)

    @property
    def draws_data(self) -> bool:
        """Whether the data are binarised at random, as an autoregressive decoder of grey values needs.

        Reading the grey values of earlier pixels would tell such a decoder more than their zeros and ones do.
        """
        return self.autoregressive and self.likelihood == "bernoulli"

    def observed(self, x: Tensor, uniform: Tensor | None = None) -> Tensor:
        """The argument of the likelihood: x, or zeros and ones drawn with probability x, by `uniform` if given."""
        if not self.draws_data:
            return x
        return torch.bernoulli(x) if uniform is None else (uniform < x).to(x.dtype)

    def log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats, one per leading index of z; x may lack the first one (samples of a datum)."""
        x = self.observed(x)
        return self.scored(self.decode(z, x), x)

    def scored(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats, for the decoder's output."""
        leading = output.shape[: output.dim() - len(self.output_shape)]
        return self.observation.log_prob(x.expand(*leading, *self.shape), output)

    def image(self, output: Tensor) -> Tensor:
        """The means of images [..., C, H, W] in [-1, 1], for the decoder's output."""
        slope, shift = self.signed
        return slope * self.observation.mean(output) + shift

    def pictured(self, z: Tensor) -> Tensor:
        """The decoder's mean of x, for pictures. An autoregressive decoder gives the mean of each value given draws of
        the earlier ones."""
        output = self.decoder.sample(z, self.drawn)[1] if isinstance(self.decoder, MaskedDecoder) else self.decode(z)
        return self.observation.mean(output)

    def drawn(self, output: Tensor, index: int) -> Tensor:
        """A sample of one value of each datum, from the decoder's output for this value."""
        if not isinstance(self.observation, Normal):
            return torch.bernoulli(output.sigmoid())
        return torch.normal(output, (self.observation.logvar.expand(self.shape).flatten()[index] / 2).exp())


def build(
    settings: Settings, shape: tuple[int, ...], likelihood: str, own: VAE | None = None, scaling: Scaling | None = None
) -> VAE:
    """The model that the settings name, or the given one. `scaling` has the levels of pixels and their range."""
    levels, image = 256 if scaling is None else scaling.levels, len(shape) == 3
    signed = scaling.signed if scaling is not None and image else (1.0, 0.0)
    if settings.model == OWN:
        vae = fitting(own, settings, shape, likelihood)
    else:
        encoder, decoder, latent_shape = networks_of(settings, shape, likelihood, levels, signed)
        vae = VAE(encoder, decoder, shape, latent_shape, likelihood, levels, settings.scale)
    # diffusers' networks have checkpoints of their own.
    vae.activation_checkpointing = settings.activation_checkpointing and settings.model != AUTOENCODER
    vae.signed = signed
    return vae


def fitting(own: VAE | None, settings: Settings, shape: tuple[int, ...], likelihood: str) -> VAE:
    """The given model.

    Raises:
        UserError: none is given, or it is for other data.
    """
    if own is None:
        raise UserError("this run has a model of its own, which cannot be rebuilt: give it by model= in Python")
    if (own.shape, own.likelihood) != (shape, likelihood):
        given = f"{list(own.shape)} with a {own.likelihood} likelihood"
        raise UserError(f"model= is for data of shape {given}; these have {list(shape)} and {likelihood}")
    if settings.scale:
        raise UserError("--scale does not apply to a run with model=: give it to the model, by VAE(..., scale=)")
    return own


def networks_of(
    settings: Settings, shape: tuple[int, ...], likelihood: str, levels: int, signed: tuple[float, float]
) -> tuple[nn.Module, nn.Module, tuple]:
    """(encoder, decoder, shape of the latent)."""
    able = {"autoregressive": ("bernoulli", "normal"), AUTOENCODER: autoencoder.LIKELIHOODS}
    if likelihood not in (names := able.get(settings.model, (likelihood,))):
        raise UserError(
            f"--model {settings.model} needs --likelihood {', '.join(names[:-1])} or {names[-1]}, got {likelihood}"
        )
    if settings.model == AUTOENCODER:
        return autoencoder.networks(settings, shape, signed)
    networks = {"mlp": mlp, "conv": conv, "autoregressive": autoregressive}[settings.model]
    outputs = levels if likelihood == "categorical" else 1
    return networks(shape, settings.latent, settings.hidden, settings.layers, outputs)


def mlp(shape: tuple, latent: int, hidden: int, layers: int, outputs: int = 1) -> tuple[nn.Module, nn.Module, tuple]:
    features = math.prod(shape)
    encoder = nn.Sequential(nn.Flatten(), *stack(features, 2 * latent, hidden, layers))
    decoder = nn.Sequential(
        *stack(latent, outputs * features, hidden, layers),
        nn.Unflatten(1, shape if outputs == 1 else (outputs, *shape)),
    )
    return encoder, decoder, (latent,)


def autoregressive(
    shape: tuple, latent: int, hidden: int, layers: int, outputs: int = 1
) -> tuple[nn.Module, nn.Module, tuple]:
    """The encoder of mlp, and a masked decoder of the same size."""
    encoder = nn.Sequential(nn.Flatten(), *stack(math.prod(shape), 2 * latent, hidden, layers))
    return encoder, MaskedDecoder(shape, latent, hidden, layers), (latent,)


def stack(inputs: int, outputs: int, hidden: int, layers: int) -> list[nn.Module]:
    widths = [inputs] + [hidden] * layers
    inner = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.SiLU())]
    return [*inner, nn.Linear(hidden, outputs)]


class Residual(nn.Module):
    """x + conv(silu(norm(x))): one convolution suffices for small pictures."""

    def __init__(self, width: int, layer: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d):
        super().__init__()
        self.body = nn.Sequential(norm(width), nn.SiLU(), layer(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def norm(width: int) -> nn.Module:
    # Not a batch norm, with which the loss would depend on the split of the batch over processes.
    return nn.GroupNorm(math.gcd(8, width), width)


def conv(shape: tuple, latent: int, hidden: int, layers: int, outputs: int = 1) -> tuple[nn.Module, nn.Module, tuple]:
    """A spatial latent [latent, H / 2^layers, W / 2^layers], as in the first stage of latent diffusion; of a video
    [latent, T / 2^layers, H / 2^layers, W / 2^layers]."""
    factor = 2**layers
    if len(shape) not in (3, 4):
        raise UserError(f"--model conv needs images or videos, but a datum has shape {shape}; use --model mlp")
    channels, *sides = shape
    check_sides(layers, shape)
    layer = nn.Conv2d if len(sides) == 2 else nn.Conv3d
    widths = [hidden * 2**level for level in range(layers + 1)]
    down: list[nn.Module] = [layer(channels, widths[0], 3, padding=1)]
    for narrow, wide in pairwise(widths):
        down += [Residual(narrow, layer), layer(narrow, wide, 3, stride=2, padding=1)]
    down += [Residual(widths[-1], layer), norm(widths[-1]), nn.SiLU(), layer(widths[-1], 2 * latent, 1)]
    up: list[nn.Module] = [layer(latent, widths[-1], 1), Residual(widths[-1], layer)]
    for narrow, wide in reversed(list(pairwise(widths))):
        larger = nn.Upsample(scale_factor=2, mode="nearest")
        up += [larger, layer(wide, narrow, 3, padding=1), Residual(narrow, layer)]
    up += [norm(widths[0]), nn.SiLU(), layer(widths[0], outputs * channels, 3, padding=1)]
    return nn.Sequential(*down), nn.Sequential(*up), (latent, *(side // factor for side in sides))
