"""VampPrior: the mixture of the posteriors of learned pseudo-inputs."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkl import distributions
from fastkl.ops import _arguments as arguments
from fastkl.priors.mixture import Mixture, MixturePrior


def _copy_function(function: Any, memo: dict) -> Any:
    """A copy of a function with copies of the modules in its closure and defaults; copy.deepcopy returns the function
    itself. A module that the function reads as a global name is shared with the copy, with a warning."""
    if not isinstance(function, types.FunctionType):
        return copy.deepcopy(function, memo)
    if id(function) in memo:
        return memo[id(function)]
    code = function.__code__
    for name in code.co_names:
        if isinstance(function.__globals__.get(name), nn.Module):
            warnings.warn(
                f"the copy of a VampPrior shares the module {name}, a global name in its encoder or transform: pass "
                f"the module itself as encoder or transform, or rebind {name} to the copy", stacklevel=2,
            )  # fmt: skip

    def copy_modules(value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return _copy_function(value, memo)
        modules = isinstance(value, (nn.Module, types.MethodType, functools.partial))
        return copy.deepcopy(value, memo) if modules else value

    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    copied = memo[id(function)] = types.FunctionType(code, function.__globals__, function.__name__, closure=cells)
    for cell, own in zip(cells, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # an empty cell
            cell.cell_contents = copy_modules(own.cell_contents)
    copied.__defaults__ = tuple(map(copy_modules, function.__defaults__ or ()))
    copied.__kwdefaults__ = {name: copy_modules(value) for name, value in (function.__kwdefaults__ or {}).items()}
    copied.__dict__.update(function.__dict__)
    return copied


class VampPrior(MixturePrior):
    """The mixture of the posteriors of K learned pseudo-inputs u_k: p(z) = sum_k pi_k q(z | u_k).

    Args:
        pseudo_inputs: initial value [K, *datum] of the parameter `pseudo_inputs`, floating point: data, or noise.
        encoder: a function of [K, *datum] that returns the posteriors: a fastkl.DiagonalNormal, a pair (mu, logvar), or
            one tensor that packs both along dimension 1, [K, 2 D, ...].
        learn_weights: whether pi = softmax(logits) is learned; else every weight is 1 / K, as in the paper.
        transform: a map of the pseudo-inputs into the data's range, applied before the encoder: torch.sigmoid, or
            nn.Hardtanh(0, 1) as in the paper.

    This module holds a reference to the autoencoder's encoder, not a submodule: the encoder's parameters are in neither
    parameters() nor state_dict(), and train(), eval() and to() of this module do not change it. Every call encodes the
    pseudo-inputs once, in the encoder's present mode (in training mode with dropout and batch statistics). A deep copy
    of the autoencoder has a prior with the copied encoder, even if the encoder is given as a lambda or a method.

    Source: Tomczak and Welling 2018, "VAE with a VampPrior", arXiv:1705.07120, equation 9.

    >>> import torch, fastkl
    >>> encoder = torch.nn.Linear(20, 2 * 3)
    >>> prior = fastkl.priors.VampPrior(torch.randn(10, 20), encoder)
    >>> q = fastkl.DiagonalNormal.from_packed(encoder(torch.randn(8, 20)))
    >>> prior.kl(q).mean().backward()
    >>> prior.pseudo_inputs.grad.shape, prior.sample(4).shape
    (torch.Size([10, 20]), torch.Size([4, 3]))
    """

    def __init__(
        self, pseudo_inputs: Tensor, encoder: Callable[[Tensor], Any], learn_weights: bool = True, *,
        transform: Callable[[Tensor], Tensor] | None = None, precision: str = "exact",
    ):  # fmt: skip
        super().__init__()
        arguments.check_tensors(pseudo_inputs=pseudo_inputs)
        if pseudo_inputs.dim() < 2 or pseudo_inputs.shape[0] == 0:
            raise ValueError(f"pseudo_inputs must be (K, *datum) with K > 0, got {tuple(pseudo_inputs.shape)}")
        if not callable(encoder):
            raise TypeError(f"encoder must be callable, got {type(encoder).__name__}")
        self.components, self.precision, self.transform = len(pseudo_inputs), precision, transform
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        logits = torch.zeros(self.components, dtype=pseudo_inputs.dtype, device=pseudo_inputs.device)
        if learn_weights:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits)
        self._encoder = (encoder,)  # a tuple, so that nn.Module does not register a submodule

    def __deepcopy__(self, memo: dict) -> VampPrior:
        """A deep copy with a copied encoder, even if the encoder is a function that holds a module."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        functions = {
            "_encoder": (_copy_function(self.encoder, memo),),
            "transform": _copy_function(self.transform, memo),
        }
        rest = {name: value for name, value in self.__dict__.items() if name not in functions}
        copied.__setstate__(copy.deepcopy(rest, memo) | functions)
        return copied

    @property
    def encoder(self) -> Callable[[Tensor], Any]:
        return self._encoder[0]

    def posteriors(self) -> distributions.DiagonalNormal:
        """The posteriors q(z | u_k), a batch of K."""
        inputs = self.pseudo_inputs if self.transform is None else self.transform(self.pseudo_inputs)
        out = self.encoder(inputs)
        if isinstance(out, Tensor):
            out = distributions.DiagonalNormal.from_packed(out, dim=1)
        elif isinstance(out, (tuple, list)) and len(out) == 2:
            out = distributions.DiagonalNormal(*out)
        if not isinstance(out, distributions.DiagonalNormal):
            raise TypeError("encoder must return a fastkl.DiagonalNormal, a pair (mu, logvar) or a packed tensor, got "
                            f"{type(out).__name__}")  # fmt: skip
        if out.event_ndim != len(out.shape) - 1 or out.shape[0] != self.components:
            raise ValueError(f"encoder must return {self.components} posteriors, one for each pseudo-input, got {out}")
        return out

    def mixture(self) -> Mixture:
        return Mixture(self.logits, *self._parameters_of(self.posteriors(), None))

    def extra_repr(self) -> str:
        return f"components={self.components}, datum={tuple(self.pseudo_inputs.shape[1:])}"
