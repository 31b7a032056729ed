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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl.distributions import DiagonalNormal
from fastkl.integrations._switch import Attribute, Layer, Switch, check_method, find
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.reference import compute_dtype

TESTED = "0.42.1"
BOUNDS = (-30.0, 20.0)  # diffusers clamps the log-variance to them
DIMS = [1, 2, 3]  # the default of diffusers' nll
GIVEN, MOMENTS = ("parameters", "deterministic"), ("mean", "logvar", "std", "var")


class lazy:
    """functools.cached_property without its lock, which torch.compile cannot trace in Python 3.10 and 3.11."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.name = function, function.__name__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = self.function(instance)
        object.__setattr__(instance, self.name, value)
        return value


class Posterior:
    """The methods that replace diffusers' own. Only `parameters` and `deterministic` are stored."""

    parameters: Tensor
    deterministic: bool
    logvar: Any
    std: Any
    stock: type  # diffusers' own class
    original: Any  # and its __init__
    draw: Any  # diffusers' randn_tensor

    @lazy
    def _q(self) -> DiagonalNormal:
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        """diffusers' own, with the attributes that a user has set."""
        own = {key: value for key, value in vars(self).items() if not hasattr(type(self), key) and key not in GIVEN}
        return type(self).stock, (self.parameters, self.deterministic), own or None

    def __setattr__(self, name: str, value: Any) -> None:
        """A posterior with something replaced computes as diffusers' own."""
        if name in (*GIVEN, *MOMENTS, "scale"):
            fused, self.__class__ = type(self), self.stock
            fused.original(self, self.parameters, self.deterministic)
        object.__setattr__(self, name, value)

    @lazy
    def mean(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[0]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std noise, with the noise that diffusers would draw from this generator."""
        like = self.parameters
        noise = self.draw(self.mean.shape, generator=generator, device=like.device, dtype=like.dtype)
        return self.mean + self.std * noise if self.deterministic else self._q.rsample(eps=noise).to(like.dtype)

    def _kl(self, other: Any) -> Tensor:
        if other is None:
            return self._q.kl()
        q = self._q
        prior = other._q if isinstance(other, Posterior) else DiagonalNormal(other.mean, other.logvar)
        if prior.shape != q.shape:  # a packed head does not broadcast to a larger one
            q = DiagonalNormal(*q.given, scale=q.kind, bounds=q.bounds)
        return q.kl(prior)


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
        kl = self._kl(other)
        return torch.full_like(kl, math.inf) if other is not None and other.deterministic else kl

    def nll(self, sample: Tensor, dims: int | list[int] | tuple[int, ...] | None = DIMS) -> Tensor:
        """-ln q(sample) in nats, one value per datum; other `dims` than the default are summed as given."""
        if self.deterministic:
            return torch.Tensor([0.0])
        if isinstance(dims, (list, tuple)) and list(dims) == DIMS:
            return -self._q.log_prob(sample)
        return -normal_log_prob(sample, self.mean, self.logvar, event_ndim=0).sum(dims)


class OobleckGaussian(Posterior):
    @lazy
    def scale(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[1]

    @lazy
    def _q(self) -> DiagonalNormal:
        scale = self.scale.to(compute_dtype(self.scale))  # in 16 bits 1e-4 would be lost, and so would digits of the KL
        return DiagonalNormal(self.mean, torch.nn.functional.softplus(scale) + 1e-4, scale="std")

    @lazy
    def logvar(self) -> Tensor:
        return self._q.logvar.to(self.parameters.dtype)

    @lazy
    def std(self) -> Tensor:
        return self._q.std.to(self.parameters.dtype)

    @lazy
    def var(self) -> Tensor:
        return self._q.var.to(self.parameters.dtype)

    def kl(self, other: Any = None) -> Tensor:
        """KL(self || other) in nats, summed over channels, its mean over the batch and all other dimensions."""
        if self.deterministic:
            return torch.Tensor([0.0])
        shape = self.mean.shape if other is None else torch.broadcast_shapes(self.mean.shape, other.mean.shape)
        return self._kl(other).mean() / math.prod(shape[2:])


def changes() -> list[Attribute]:
    version = f"diffusers {importlib.import_module('diffusers').__version__} (tested with {TESTED})"
    found, draw = [], find("diffusers.utils.torch_utils", "randn_tensor", version)
    for module, name, methods, fused in (
        ("vae", "DiagonalGaussianDistribution", {"kl": ("self", "other"), "nll": ("self", "sample", "dims")},
         DiagonalGaussian),
        ("autoencoder_oobleck", "OobleckDiagonalGaussianDistribution", {"kl": ("self", "other")}, OobleckGaussian),
    ):  # fmt: skip
        stock = find(f"diffusers.models.autoencoders.{module}", name, version)
        methods |= {"__init__": ("self", "parameters", "deterministic"), "sample": ("self", "generator")}
        for method, parameters in methods.items():
            check_method(stock, method, parameters, version)
        found += replacements(stock, fused, draw, [name for name in ("kl", "nll") if name in methods])
    return found


def can_be_fused(parameters: Any) -> bool:
    """Else diffusers' own class has an answer, or an error."""
    floating = isinstance(parameters, Tensor) and parameters.is_floating_point()
    return floating and parameters.dim() > 1 and parameters.shape[1] % 2 == 0


def replacements(stock: type, fused: type, draw: Any, names: list[str]) -> list[Attribute]:
    """An __init__ that makes a new instance of `stock` one of `fused` as well. Subclasses keep their own methods.

    torch.compile cannot trace a change of class. In what it compiles, an instance stays `stock`, and keeps what it
    began with. These methods of it, which are replaced too, compute with fastkl as long as nothing was replaced.
    """
    original = stock.__init__  # type: ignore[misc]
    own = {"stock": stock, "original": staticmethod(original), "draw": staticmethod(draw)}
    own["__module__"] = stock.__module__
    both = type(stock.__name__, (fused, stock), own)

    @functools.wraps(original)
    def __init__(self, parameters, deterministic=False):
        if type(self) is not stock or not can_be_fused(parameters):
            original(self, parameters, deterministic)
        elif torch.compiler.is_compiling():
            original(self, parameters, deterministic)
            self.compiled_with_fastkl = [parameters, *(getattr(self, name) for name in MOMENTS)]
        else:
            self.__class__ = both
            vars(self).update(parameters=parameters, deterministic=deterministic)

    def fused_of(posterior: Any) -> Any:
        """The same posterior as one of `both`, if it was compiled as such and nothing was replaced."""
        began = getattr(posterior, "compiled_with_fastkl", None)
        if began is None:
            return posterior
        for name, value in zip(("parameters", *MOMENTS), began):
            if getattr(posterior, name) is not value:
                return posterior
        like: Any = object.__new__(both)
        for name in GIVEN:
            object.__setattr__(like, name, getattr(posterior, name))
        return like

    def of_compiled(name: str) -> Any:
        method, new = getattr(stock, name), getattr(fused, name)

        @functools.wraps(method)
        def call(self, *args, **settings):
            like = fused_of(self)
            if like is self:
                return method(self, *args, **settings)
            settings = {key: fused_of(value) for key, value in settings.items()}
            return new(like, *(fused_of(arg) for arg in args), **settings)

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
