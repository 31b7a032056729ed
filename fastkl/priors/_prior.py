"""The base class of priors: the Monte-Carlo KL, and the checks of posteriors and latents."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkl import distributions, reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._sampling import Seed
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.ops.normal._closed_form import samples_dtype
from fastkl.ops.normal.rsample_normal import rsample_normal


def check_shape(n: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of n draws."""
    return tuple(arguments.check_int("n", size, 0) for size in (n if isinstance(n, (tuple, list)) else (n,)))


# The methods of priors that read parameters, which fully_shard keeps sharded except in a module's forward.
READ = ("log_prob", "responsibilities", "kl", "kl_bounds", "kl_relaxed", "usage", "sample", "rsample")


def _in_forward(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a sharded prior: the outermost call gathers the parameters, as forward would."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **settings: Any) -> Any:
        if self._inside:
            return method(self, *args, **settings)
        if "_whole" not in self.__dict__:
            torch.distributed.fsdp.register_fsdp_forward_method(self, "_whole")
        self._inside = True
        try:
            return self._whole(method, *args, **settings)
        finally:
            self._inside = False

    return run


def _refused(self: Any, *args: Any, **settings: Any) -> Any:
    raise RuntimeError("fit a prior before fully_shard, which would drop the parameters that are found afterwards")


class Prior(nn.Module):
    """The base class of priors.

    A custom prior defines `log_prob(z)` [..., D] -> [...] and `sample(n)`, and inherits `kl`. With `rsample(n)` it also
    works in objectives that compare draws. After fully_shard(prior), these methods gather the parameters.
    """

    _inside = False  # a method that gathered the parameters

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if any(base.__name__ == "FSDPModule" for base in cls.__bases__):  # the class that fully_shard makes
            for name in READ:
                if hasattr(cls, name):
                    setattr(cls, name, _in_forward(getattr(cls, name)))
            if hasattr(cls, "fit"):
                setattr(cls, "fit", _refused)  # noqa: B010 (mypy refuses the assignment to a method)

    def _whole(self, method: Callable[..., Any], /, *args: Any, **settings: Any) -> Any:
        found = method(self, *args, **settings)
        return found.clone() if isinstance(found, Tensor) else found  # fully_shard warns of a view

    dim: int | None = None
    methods: tuple[str, ...] = ("mc",)

    if TYPE_CHECKING:  # of those priors that have them

        def fit(self, *args: Any, **kwargs: Any) -> Any: ...

        def kl_relaxed(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def log_prob(self, z: Tensor) -> Tensor:
        """ln p(z) [*batch] of z [*batch, D]."""
        raise NotImplementedError

    def sample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        """n draws [n, D], or draws of a shape, [*n, D], without gradient; `seed` as for `fastkl.rsample_kl`: each rank
        draws others, unless it is (seed, rank)."""
        raise NotImplementedError

    def rsample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        """As `sample`, with gradients to the prior's parameters, for objectives that compare draws (MMD, transport)."""
        raise NotImplementedError

    def kl(
        self, q: distributions.DiagonalNormal, *, method: str = "mc", num_samples: int = 1, entropy: str = "closed",
        gradient: str = "plain", seed: Seed | None = None,
    ) -> Tensor:  # fmt: skip
        """KL(q || p) [*batch], by samples: E_q[ln q] - 1/L sum_l ln p(z_l); arguments as for `fastkl.kl_gmm`.

        Raises:
            TypeError: q is not a fastkl.DiagonalNormal.
            ValueError: q has another number of dimensions, or the prior does not support the method.
        """
        self._check_estimator(method, entropy, gradient)
        mu, logvar = self._parameters_of(q, self.dim)
        dtype = reference.compute_dtype(mu, logvar)  # cast first: the gradients of all parts are summed in this dtype
        mu, logvar = mu.to(dtype), logvar.to(dtype)
        num_samples = arguments.check_int("num_samples", num_samples, 1)
        seed = sampling.check_seed(seed, mu.device, "q"), 0
        z = rsample_normal(mu, logvar, num_samples=num_samples, seed=seed)
        cross = self.log_prob(z.to(samples_dtype(*q.given))).mean(0)
        dtype = reference.compute_dtype(logvar, cross)
        if entropy == "closed" and gradient == "plain":
            return -reference.normal_entropy(logvar, dtype) - cross
        # (z - mu) / sigma is the noise, but for large mu the difference keeps few digits of it. For "stl" the noise
        # moves with z, and the parameters are fixed.
        zero = mu.new_zeros(())
        noise = rsample_normal(zero.expand(mu.shape), zero, num_samples=num_samples, seed=seed)
        if gradient == "stl":
            logvar = logvar.detach()
            noise = noise + (z - z.detach()) * (-0.5 * logvar).exp()
        log_q = normal_log_prob(noise, zero, zero, event_ndim=1).mean(0) - 0.5 * logvar.to(dtype).sum(-1)
        if entropy == "closed":  # the closed form's value with the gradient through z_l only
            log_q = -reference.normal_entropy(logvar, dtype).detach() + (log_q - log_q.detach())
        return log_q - cross

    def _check_estimator(self, method: str, entropy: str, gradient: str) -> None:
        known = {"method": self.methods, "entropy": ("closed", "sampled"), "gradient": ("plain", "stl")}
        for (name, values), value in zip(known.items(), (method, entropy, gradient)):
            arguments.check_choice(f"{name} of {type(self).__name__}.kl", value, values)

    def _check_posterior(self, q: distributions.DiagonalNormal, dim: int | None) -> None:
        if not isinstance(q, distributions.DiagonalNormal):
            raise TypeError(f"q must be a fastkl.DiagonalNormal, got {type(q).__name__}")
        event = q.shape[len(q.shape) - q.event_ndim :]
        if dim not in (None, math.prod(event)):
            raise ValueError(f"q has events of shape {tuple(event)}, but the prior has {dim} dimensions")

    def _parameters_of(self, q: distributions.DiagonalNormal, dim: int | None, *others) -> tuple[Tensor, Tensor]:
        """mu and ln sigma^2 [*batch, dim], for an op on them and `others`."""
        self._check_posterior(q, dim)
        return q.vectors(*others)

    def _check_latent(self, z: Tensor) -> Tensor:
        arguments.check_tensors(z=z)
        if z.dim() == 0 or z.shape[-1] != self.dim:
            raise ValueError(f"z must be (*batch, {self.dim}), got {tuple(z.shape)}")
        return z

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
