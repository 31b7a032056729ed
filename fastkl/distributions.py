"""The posterior: a diagonal Gaussian given by two tensors, or by one that packs both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._sampling import Seed
from fastkl.ops._scales import as_logvar
from fastkl.ops._torch import register_container
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.ops.normal._closed_form import samples_dtype
from fastkl.ops.normal.kl_normal import kl_normal, kl_normal_packed
from fastkl.ops.normal.kl_normal_per_dim import kl_normal_per_dim
from fastkl.ops.normal.rsample_kl import rsample_kl, rsample_kl_packed
from fastkl.ops.normal.rsample_normal import rsample_normal, rsample_normal_packed
from fastkl.reference import SoftBounds


@dataclass(init=False, repr=False, eq=False)
class DiagonalNormal:
    """q = N(mu, diag sigma^2), the posterior from an encoder, with the ops as methods.

    Args:
        mu, logvar: mean and log-variance (or another parameter, see `scale`); they broadcast. One of them may be a
            number, which takes the other's dtype, as in torch.full_like.
        event_ndim: number of last dimensions that form one datum. None: every dimension after the first, which gives
            one KL per datum for [N, D], [N, T, D], [N, C, H, W] and [N, C, T, H, W]. 0: each element is a datum.
        scale: "logvar", "log_std", "std" or "softplus".
        bounds: (low, high) or fastkl.SoftBounds on the log-variance, for all methods.

    Raises:
        TypeError, ValueError: as `fastkl.kl_normal`.

    >>> import torch, fastkl
    >>> head = torch.randn(8, 32, 16, 16, requires_grad=True)  # an encoder's last layer, mu and logvar packed
    >>> q = fastkl.DiagonalNormal.from_packed(head)
    >>> z, kl = q.rsample_kl()
    >>> z.shape, kl.shape
    (torch.Size([8, 16, 16, 16]), torch.Size([8]))
    >>> kl.mean().backward()
    >>> head.grad.shape
    torch.Size([8, 32, 16, 16])

    It has the names of torch.distributions: `loc`, `scale` and `stddev` (sigma), `variance`, `mode`, `sample`,
    `rsample`, `log_prob`, `entropy`, `batch_shape`, `event_shape`, `expand`. `torch.distributions.kl_divergence`
    accepts it with another one, `Normal`, `Independent(Normal)`, `MultivariateNormal`, `MixtureSameFamily` and the
    priors of `fastkl.priors`: one KL per datum.

    Other code gets the unrounded ln sigma^2 from `exact_logvar`, both parameters from `mean_and_logvar` or, in the
    priors' form, from `vectors`, and the original tensors from `given`.
    """

    # A dataclass, so that torch finds the tensors in a model's output; these are the ops' arguments.
    tensors: tuple[Tensor, ...]  # (mu, logvar or the parameter of scale), of equal rank; or (head,) that packs both
    event_ndim: int
    kind: str  # the kind of the second tensor: `scale`
    bounds: SoftBounds | tuple[float, float] | None
    packed_dim: int | None  # of a packed head, negative

    def __init__(
        self, mu: Tensor | float | None = None, logvar: Tensor | float | None = None, *, event_ndim: int | None = None,
        scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
        tensors: tuple[Tensor, ...] | None = None, kind: str | None = None, packed_dim: int | None = None,
    ) -> None:  # fmt: skip
        if tensors is None:  # else rebuilt from another one's fields, as by dataclasses.replace
            given = (mu, logvar)
            both = arguments.as_parameters(*given)
            arguments.check_tensors(**dict(zip(("mu", "logvar"), both)))
            dtype = samples_dtype(*given)  # a number takes the tensor's dtype
            both = tuple(new if new is old else new.to(dtype) for new, old in zip(both, given))
            shape = arguments.broadcast_shape(**dict(zip(("mu", "logvar"), both)))
            tensors = tuple(t if t.dim() == len(shape) else t[(None,) * (len(shape) - t.dim())] for t in both)
            event_ndim = _check(shape, event_ndim, scale, bounds)
        assert event_ndim is not None, "the fields of another posterior have it"
        self.tensors, self.packed_dim = tensors, packed_dim
        self.event_ndim, self.kind, self.bounds = event_ndim, kind or scale, bounds

    @classmethod
    def from_packed(
        cls, head: Tensor, dim: int = 1, *, event_ndim: int | None = None, scale: str = "logvar",
        bounds: SoftBounds | tuple[float, float] | None = None,
    ) -> DiagonalNormal:  # fmt: skip
        """The posterior from one tensor whose first half along `dim` is mu and whose second half is logvar.

        `kl`, `rsample` and `rsample_kl` read the halves in place, and the kernel writes their gradient to one packed
        tensor: no copy, no concatenation.
        """
        arguments.check_tensors(head=head)
        dim = arguments.check_packed(head, dim)
        event_ndim = _check(head.chunk(2, dim)[0].shape, event_ndim, scale, bounds)
        return cls(
            tensors=(head,), packed_dim=dim - head.dim(), event_ndim=event_ndim, scale=scale, bounds=bounds
        )  # fmt: skip

    # ---- moments ----

    @property
    def mean(self) -> Tensor:
        return self.given[0].expand(self.shape)

    loc = mode = mean

    @property
    def logvar(self) -> Tensor:
        """ln sigma^2 within the bounds, differentiable."""
        return self.exact_logvar.to(self.given[1].dtype)

    @property
    def std(self) -> Tensor:
        return self._exp(0.5)

    scale = stddev = std

    @property
    def var(self) -> Tensor:
        return self._exp(1.0)

    variance = var

    def _exp(self, factor: float) -> Tensor:
        """exp(factor logvar), rounded at the end: its gradient multiplies by this value, which may overflow float16."""
        logvar = self.exact_logvar
        return torch.exp(factor * logvar.to(reference.compute_dtype(logvar))).to(self.given[1].dtype)

    def _given(self, *others: Tensor) -> tuple[Tensor, Tensor]:
        """mu and ln sigma^2 before broadcasting. A logarithm has the compute dtype of an op on these and `others`: one
        rounded to bfloat16 would bias every density by tenths of a nat per dimension."""
        mu, parameter = self.given
        return mu, as_logvar("scale", parameter, self.kind, mu, *others, bounds=self.bounds)

    def mean_and_logvar(self, *others: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, ln sigma^2 within the bounds), both of the full shape, for an op on them and `others`.

        Logarithms and broadcast tensors, whose gradients are summed, are in float32, or float64 if any of them is.
        Others have their given dtype.
        """
        (mu, logvar), shape = self._given(*others), self.shape
        return arguments.expand(mu, shape), arguments.expand(logvar, shape)

    @property
    def exact_logvar(self) -> Tensor:
        """ln sigma^2 of the full shape, as `logvar`, without rounding to 16 bits."""
        return self.mean_and_logvar()[1]

    def vectors(self, *others: Tensor) -> tuple[Tensor, Tensor]:
        """`mean_and_logvar` with flattened events: [*batch, D]."""
        mu, logvar = self.mean_and_logvar(*others)
        if self.event_ndim == 0:
            return mu.unsqueeze(-1), logvar.unsqueeze(-1)
        return mu.flatten(-self.event_ndim), logvar.flatten(-self.event_ndim)

    @property
    def given(self) -> tuple[Tensor, Tensor]:
        """mu and the second parameter (of type `kind`) as given, not broadcast; halves of a packed head are views."""
        mu, parameter = self.tensors if self.packed_dim is None else self.tensors[0].chunk(2, self.packed_dim)
        return mu, parameter

    @property
    def shape(self) -> torch.Size:
        mu, parameter = self.given
        return mu.shape if mu.shape == parameter.shape else torch.broadcast_shapes(mu.shape, parameter.shape)

    @property
    def batch_shape(self) -> torch.Size:
        return self.shape[: len(self.shape) - self.event_ndim]

    @property
    def event_shape(self) -> torch.Size:
        return self.shape[len(self.shape) - self.event_ndim :]

    # ---- the same posterior, elsewhere ----

    def _with(self, tensors: Iterable[Tensor]) -> DiagonalNormal:
        return dataclasses.replace(self, tensors=tuple(tensors))

    def to(self, *args: Any, **kwargs: Any) -> DiagonalNormal:
        """The posterior with another dtype or device, as torch.Tensor.to."""
        return self._with(tensor.to(*args, **kwargs) for tensor in self.tensors)

    def detach(self) -> DiagonalNormal:
        return self._with(tensor.detach() for tensor in self.tensors)

    def expand(self, batch_shape: Sequence[int]) -> DiagonalNormal:
        """The posterior expanded to a larger batch, without copies; events do not change."""
        shape = (*batch_shape, *self.event_shape)
        tensors = (half.expand(shape) for half in self.given)
        return dataclasses.replace(self, tensors=tuple(tensors), packed_dim=None)

    # ---- the ops ----

    def _of(self, prior: DiagonalNormal | None) -> tuple[Tensor, ...]:
        """The prior's parameters, for an op on these ones."""
        if prior is None:
            return ()
        if not isinstance(prior, DiagonalNormal):
            raise TypeError(f"prior must be a fastkl.DiagonalNormal or None, got {type(prior).__name__}")
        return prior._given(*self.tensors)

    def _settings(self) -> dict[str, Any]:
        return {"scale": self.kind, "bounds": self.bounds}

    def rsample(
        self, sample_shape: Sequence[int] = (), *, num_samples: int | None = None, seed: Seed | None = None,
        eps: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Samples by `fastkl.rsample_normal`: [*shape], [num_samples, *shape], or [*sample_shape, *shape]."""
        if len(sample_shape):
            if num_samples is not None or eps is not None:
                raise ValueError("sample_shape excludes num_samples and eps, which have a shape of their own")
            drawn = self.rsample(num_samples=math.prod(sample_shape), seed=seed)
            return drawn.unflatten(0, tuple(sample_shape))
        settings = {"num_samples": num_samples, "seed": seed, "eps": eps, **self._settings()}
        if self.packed_dim is not None:
            return rsample_normal_packed(self.tensors[0], self.packed_dim, **settings)
        return rsample_normal(*self.tensors, **settings)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = (), *, seed: Seed | None = None) -> Tensor:
        """Samples as from `rsample`, without gradient."""
        return self.rsample(sample_shape, seed=seed)

    def kl(self, prior: DiagonalNormal | None = None) -> Tensor:
        """KL(q || prior) in nats, one per datum; the prior is N(0, I) or another DiagonalNormal."""
        settings = {"event_ndim": self.event_ndim, **self._settings()}
        if self.packed_dim is not None:
            return kl_normal_packed(self.tensors[0], self.packed_dim, *self._of(prior), **settings)
        return kl_normal(*self.tensors, *self._of(prior), **settings)

    def kl_per_dim(self, prior: DiagonalNormal | None = None) -> Tensor:
        """KL(q || prior) of each latent dimension, averaged over the batch: [*event]."""
        settings = {"event_ndim": self.event_ndim, **self._settings()}
        return kl_normal_per_dim(*self.given, *self._of(prior), **settings)

    def rsample_kl(
        self, prior: DiagonalNormal | None = None, *, num_samples: int | None = None,
        seed: Seed | None = None, eps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(rsample, kl) in one pass."""
        drawn = {"num_samples": num_samples, "seed": seed, "eps": eps}
        settings = {"event_ndim": self.event_ndim, **drawn, **self._settings()}
        if self.packed_dim is not None:
            return rsample_kl_packed(self.tensors[0], self.packed_dim, *self._of(prior), **settings)
        return rsample_kl(*self.tensors, *self._of(prior), **settings)

    def log_prob(self, z: Tensor) -> Tensor:
        """ln q(z) in nats, one per datum; z may have leading dimensions of samples."""
        arguments.check_tensors(z=z)
        return normal_log_prob(z, *self.mean_and_logvar(z), event_ndim=self.event_ndim)

    def entropy(self) -> Tensor:
        """1/2 sum_d [ln(2 pi e) + logvar_d] in nats, one per datum."""
        return reference.normal_entropy(self.vectors()[1])

    def __repr__(self) -> str:
        return f"DiagonalNormal(shape={tuple(self.shape)}, event_ndim={self.event_ndim})"


def _check(shape: torch.Size, event_ndim: int | None, scale: str, bounds: Any) -> int:
    """The settings of a posterior of this shape; returns its event_ndim."""
    arguments.check_bounds(bounds)
    arguments.check_scale(scale)
    return arguments.event_ndim_of_datum(event_ndim, shape, "a posterior of shape")


def _flatten(q: DiagonalNormal) -> tuple[list[Tensor], tuple]:
    return list(q.tensors), (q.event_ndim, q.kind, q.packed_dim, *arguments.check_bounds(q.bounds))


def _unflatten(tensors: Iterable[Tensor], settings: tuple) -> DiagonalNormal:
    event_ndim, kind, packed_dim, *bounds = settings
    named = {"event_ndim": event_ndim, "kind": kind, "bounds": arguments.as_bounds(*bounds)}
    return DiagonalNormal(tensors=tuple(tensors), packed_dim=packed_dim, **named)


register_container(DiagonalNormal, _flatten, _unflatten)
