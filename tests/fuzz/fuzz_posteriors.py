"""Calls of the methods of a posterior, given by two tensors or by a packed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastkl

import fuzz_oracle as oracle
from fuzz_check import Case, Rounding, compute_dtype
from fuzz_inputs import Draw, parameter_of
from fuzz_normal import bounds_of, broadcastable, positive
from helpers import DEVICE


@dataclass
class Posterior:
    tensors: dict[str, torch.Tensor]
    make: Callable  # fastkl's, of tensors by name, of which it takes its own
    parts: Callable  # mu and ln sigma^2 of the full shape in plain torch, likewise
    shape: tuple[int, ...]
    ndim: int
    settings: dict


def posterior_of(d: Draw, shape, ndim: int, location=None, logvar=None, *, bounds=True, dtype=None) -> Posterior:
    """Of this shape, whose last ndim dimensions are one datum."""
    location, logvar = location or d.location, logvar or d.logvar
    scale = d.pick(("logvar", "logvar", "log_std", "std", "softplus"))
    plain = {"scale": scale, "bounds": bounds_of(d) if bounds else None}
    settings = {"event_ndim": ndim, **plain}
    dim = d.random.randrange(len(shape) - ndim, len(shape)) if len(shape) > ndim else None
    packed = dim is not None and d.chance(0.5)
    if packed:
        values = torch.cat([location(shape), parameter_of(logvar(shape), scale)], dim)
        tensors = {"head": d.tensor(values, dtype, expand=False)}
        if scale == "std":
            _keep_positive(tensors, dim)
        make = lambda head, **_: fastkl.DiagonalNormal.from_packed(head, dim, **settings)  # noqa: E731
    else:
        first, second = d.pick(((shape, shape), (shape, shape), (shape, broadcastable(d, shape))))
        tensors = {
            "mu": d.tensor(location(first), dtype),
            "logvar": d.tensor(parameter_of(logvar(second), scale), dtype),
        }
        if scale == "std":
            tensors["logvar"] = positive(tensors["logvar"])
        make = lambda mu, logvar, **_: fastkl.DiagonalNormal(mu, logvar, **settings)  # noqa: E731

    def parts(head=None, mu=None, logvar=None, **_):
        mu, parameter = head.chunk(2, dim) if packed else (mu, logvar)
        return mu.expand(shape), oracle.to_logvar(parameter, **plain).expand(shape)

    return Posterior(tensors, make, parts, tuple(shape), ndim, settings | {"packed": dim if packed else None})


def _keep_positive(tensors, dim) -> None:
    with torch.no_grad():
        std = tensors["head"].chunk(2, dim)[1]
        std.clamp_(min=torch.finfo(std.dtype).tiny)


def kl_of(mu, logvar, prior=None):
    """Elements of the KL to N(0, I) or to another Gaussian, all in ln sigma^2."""
    return oracle.kl_elements(mu, logvar, *(prior or ()))


METHODS = (
    "kl",
    "rsample",
    "rsample_kl",
    "entropy",
    "kl_per_dim",
    "log_prob",
    "log_prob",
    "mean",
    "logvar",
    "std",
    "var",
)


def posterior(d: Draw) -> Case:
    """The methods of a posterior."""
    shape = d.pick(((d.size(9), d.size(40)), (d.size(9), d.size(40)), (2, 4, 3, 5), (3, 2, 6), (2, 6, 1, 2)))
    method = d.pick(METHODS)
    ndim = d.random.randint(1, len(shape))

    def narrow(shape):  # squared distances over sigma^2 stay in float32's range
        return d.logvar(shape, -20.0, 20.0)

    q = posterior_of(d, shape, ndim, None, narrow if method == "log_prob" else None)
    tensors, seed = dict(q.tensors), d.seed()
    event = shape[len(shape) - ndim :]
    other = (
        posterior_of(d, event if d.chance(0.5) else shape, ndim, None, narrow)
        if "kl" in method and d.chance(0.5)
        else None
    )
    if other is not None:
        tensors |= {f"other_{name}": t for name, t in other.tensors.items()}
    if method == "log_prob":
        tensors["z"] = d.tensor(d.location((*d.pick(((), (2,))), *shape)))
    zero = torch.zeros(shape, dtype=compute_dtype(tensors), device=DEVICE)
    uncertain = 3e-7 if all(t.itemsize >= 4 for t in q.tensors.values()) else 1e-6
    if zero.dtype == torch.float64 != compute_dtype(q.tensors):  # the prior's alone, and the noise is float32's
        uncertain *= Rounding(torch.float64).times

    def of_other(t):
        return {name.removeprefix("other_"): tensor for name, tensor in t.items() if name.startswith("other_")}

    def own(t):
        return {name: tensor for name, tensor in t.items() if not name.startswith("other_")}

    def call(**t):
        bound = getattr(q.make(**own(t)), method)
        if method in ("mean", "logvar", "std", "var"):
            return bound
        prior = () if other is None else (other.make(**of_other(t)),)
        return bound(*prior, *([t["z"]] if "z" in t else []), **({"seed": seed} if "rsample" in method else {}))

    def truth(noise=None, **t):
        mu, logvar = q.parts(**own(t))
        kl = kl_of(mu, logvar, None if other is None else other.parts(**of_other(t)))
        z = None if noise is None else mu + torch.exp(0.5 * logvar) * noise
        return {
            "kl": lambda: oracle.last(kl, ndim),
            "rsample": lambda: z,
            "rsample_kl": lambda: (z, oracle.last(kl, ndim)),
            "entropy": lambda: oracle.entropy(logvar.flatten(-ndim)),
            "kl_per_dim": lambda: kl if kl.dim() == ndim else kl.flatten(0, -ndim - 1).mean(0),
            "log_prob": lambda: oracle.last(oracle.normal_terms(t["z"], mu, logvar), ndim),
            "mean": lambda: mu * 1.0,
            "logvar": lambda: logvar * 1.0,
            "std": lambda: torch.exp(0.5 * logvar),
            "var": lambda: torch.exp(logvar),
        }[method]()

    def noise():
        return fastkl.rsample_normal(zero, zero, seed=seed).double(), uncertain

    settings = q.settings | {"method": method, "other": other and other.settings}
    return Case(call, tensors, truth, noise if "rsample" in method else None, settings)
