"""fastkl inside diffusers: the posteriors of its autoencoders.

    fastkl.integrations.diffusers.enable()      # until disable(), or for a block: with diffusers.enable():

Every new `DiagonalGaussianDistribution` and `OobleckDiagonalGaussianDistribution`, of any autoencoder, computes
`sample`, `kl` and `nll` with fastkl; existing ones are unchanged. `mean`, `logvar`, `std` and `var` are computed on
access, not in advance.

Where the values differ, those of diffusers are wrong:

- `kl` and `nll` are one value per datum for any rank. diffusers sums dimensions 1 to 3: the KL of a video
  [N, C, T, H, W] is [N, W], and its mean is 1 / W of the KL.
- For 16-bit tensors `kl` and `nll` are float32. In bfloat16 the differences in the KL would be rounded away.
- `OobleckDiagonalGaussianDistribution.kl` is the KL. diffusers returns twice the KL, and with `other` a term of the
  wrong sign. Double a weight that was tuned for it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl.distributions import DiagonalNormal
from fastkl.integrations._switch import Attribute, Layer, Switch, check_method, find
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob

TESTED = "0.42.1"
BOUNDS = (-30.0, 20.0)  # diffusers clamps the log-variance to them
DIMS = [1, 2, 3]  # the default of diffusers' nll


class lazy:
    """functools.cached_property without its lock, which torch.compile cannot trace in Python 3.10 and 3.11."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.name = function, function.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        value = self.function(instance)
        object.__setattr__(instance, self.name, value)
        return value


class Posterior:
    """The methods that replace diffusers' own. Only `parameters` and `deterministic` are stored."""

    parameters: Tensor
    deterministic: bool
    std: Any
    stock: type  # diffusers' own class
    original: Any  # and its __init__

    @lazy
    def _q(self) -> DiagonalNormal:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).stock, (self.parameters, self.deterministic)

    def __setattr__(self, name: str, value: Any) -> None:
        """A posterior whose moments are replaced computes with the new ones, as diffusers' own."""
        if name in ("mean", "std", "var", "logvar"):
            fused, self.__class__ = type(self), self.stock
            fused.original(self, self.parameters, self.deterministic)
        object.__setattr__(self, name, value)

    @lazy
    def mean(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[0]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std noise, with the noise that diffusers would draw from this generator."""
        draw = importlib.import_module("diffusers.utils.torch_utils").randn_tensor
        like = self.parameters
        noise = draw(self.mean.shape, generator=generator, device=like.device, dtype=like.dtype)
        return self.mean + self.std * noise if self.deterministic else self._q.rsample(eps=noise)


class DiagonalGaussian(Posterior):
    @lazy
    def _q(self) -> DiagonalNormal:
        return DiagonalNormal.from_packed(self.parameters, bounds=BOUNDS)

    @lazy
    def logvar(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[1].clamp(*BOUNDS)

    @lazy
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self._q.std

    @lazy
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else self._q.var

    def kl(self, other: Any = None) -> Tensor:
        """KL(self || other) in nats, one value per datum; without `other`, to N(0, I)."""
        if self.deterministic:
            return torch.Tensor([0.0])
        return self._q.kl(None if other is None else DiagonalNormal.from_packed(other.parameters, bounds=BOUNDS))

    def nll(self, sample: Tensor, dims: int | Sequence[int] = DIMS) -> Tensor:
        """-ln q(sample) in nats, one value per datum; other `dims` than the default are summed as given."""
        if self.deterministic:
            return torch.Tensor([0.0])
        dims = [dims] if isinstance(dims, int) else list(dims)
        if dims == DIMS:
            return -self._q.log_prob(sample)
        return -normal_log_prob(sample, self.mean, self.logvar, event_ndim=0).sum(dims)


class OobleckGaussian(Posterior):
    @lazy
    def scale(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[1]

    @lazy
    def _q(self) -> DiagonalNormal:
        return DiagonalNormal(self.mean, torch.nn.functional.softplus(self.scale) + 1e-4, scale="std")

    @lazy
    def logvar(self) -> Tensor:
        return self._q.logvar

    @lazy
    def std(self) -> Tensor:
        return self._q.std

    @lazy
    def var(self) -> Tensor:
        return self._q.var

    def kl(self, other: Any = None) -> Tensor:
        """KL(self || other) in nats, summed over channels, its mean over the batch and all other dimensions."""
        if self.deterministic:
            return torch.Tensor([0.0])
        prior = None
        if other is not None:
            std = torch.nn.functional.softplus(other.parameters.chunk(2, dim=1)[1]) + 1e-4
            prior = DiagonalNormal(other.parameters.chunk(2, dim=1)[0], std, scale="std")
        return self._q.kl(prior).mean() / math.prod(self.mean.shape[2:])


def changes() -> list[Attribute]:
    version = f"diffusers {importlib.import_module('diffusers').__version__} (tested with {TESTED})"
    found = []
    for module, name, methods, fused in (
        ("vae", "DiagonalGaussianDistribution", {"kl": ("self", "other"), "nll": ("self", "sample", "dims")},
         DiagonalGaussian),
        ("autoencoder_oobleck", "OobleckDiagonalGaussianDistribution", {"kl": ("self", "other")}, OobleckGaussian),
    ):  # fmt: skip
        stock = find(f"diffusers.models.autoencoders.{module}", name, version)
        methods |= {"__init__": ("self", "parameters", "deterministic"), "sample": ("self", "generator")}
        for method, parameters in methods.items():
            check_method(stock, method, parameters, version)
        found += replacements(stock, fused, [name for name in ("kl", "nll") if name in methods])
    return found


def replacements(stock: type, fused: type, names: list[str]) -> list[Attribute]:
    """An __init__ that makes a new instance of `stock` one of `fused` as well. Subclasses keep their own methods.

    torch.compile cannot trace a change of class. In what it compiles, an instance stays `stock`, with a mark by which
    these methods of it, which are replaced too, know it.
    """
    original = stock.__init__  # type: ignore[misc]
    own = {"stock": stock, "original": staticmethod(original), "__module__": stock.__module__}
    both = type(stock.__name__, (fused, stock), own)

    def __init__(self, parameters, deterministic=False):
        if type(self) is not stock:
            original(self, parameters, deterministic)
        elif torch.compiler.is_compiling():
            original(self, parameters, deterministic)
            self.compiled_with_fastkl = True
        else:
            self.__class__ = both
            self.parameters, self.deterministic = parameters, deterministic

    def of_compiled(name: str) -> Any:
        method, new = getattr(stock, name), getattr(fused, name)

        @functools.wraps(method)
        def call(self, *args, **settings):
            if not getattr(self, "compiled_with_fastkl", False):
                return method(self, *args, **settings)
            like = object.__new__(both)
            like.parameters, like.deterministic = self.parameters, self.deterministic
            return new(like, *args, **settings)

        return call

    return [Attribute(stock, "__init__", __init__), *(Attribute(stock, name, of_compiled(name)) for name in names)]


_switch = Switch(changes)


def enable() -> Layer:
    """Use fastkl in the posteriors of diffusers until `disable()`; as a context manager, until the block ends.

    Raises:
        ImportError: diffusers is not installed.
        UnsupportedVersion: its classes have other methods than fastkl expects. Nothing was replaced.
    """
    return _switch.enable()


def disable() -> None:
    """Undo the last `enable()`. Posteriors created in between keep using fastkl, except those that a function of
    torch.compile returned."""
    _switch.disable()
