"""The posterior object: a diagonal Gaussian given by two tensors, or by one that packs both."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops.kl_normal import kl_normal, kl_normal_packed
from fastkl.ops.kl_normal_per_dim import kl_normal_per_dim
from fastkl.ops.normal_log_prob import normal_log_prob
from fastkl.ops.rsample_kl import rsample_kl, rsample_kl_packed
from fastkl.ops.rsample_normal import rsample_normal, rsample_normal_packed
from fastkl.reference import SoftBounds


class DiagonalNormal:
    """q = N(mu, diag sigma^2): what an encoder puts out, with the ops as methods.

    Args:
        mu, logvar: mean and log-variance (or what `scale` says); they broadcast.
        event_ndim: how many of the last dimensions are one datum; default every dimension after the first, whatever the
            rank, so that there is one KL per datum for [N, D], [N, T, D], [N, C, H, W] and [N, C, T, H, W] alike.
        scale: "logvar", "log_std", "std" or "softplus".
        bounds: (low, high) or fastkl.SoftBounds on the log-variance, for everything below.

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
    """

    def __init__(
        self, mu: Tensor, logvar: Tensor, *, event_ndim: int | None = None, scale: str = "logvar",
        bounds: SoftBounds | tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        arguments.check_tensors(mu=mu, logvar=logvar)
        shape = arguments.broadcast_shape(mu=mu, logvar=logvar)
        self._head, self._dim = None, -1
        self._mu, self._parameter = mu, logvar  # the ops broadcast them, and sum their gradients without rounding
        self._finish(shape, event_ndim, scale, bounds)

    @classmethod
    def from_packed(
        cls, head: Tensor, dim: int = 1, *, event_ndim: int | None = None, scale: str = "logvar",
        bounds: SoftBounds | tuple[float, float] | None = None,
    ) -> DiagonalNormal:  # fmt: skip
        """From one tensor whose first half along `dim` is mu and whose second half is logvar.

        `kl`, `rsample` and `rsample_kl` read the halves where they lie, and their gradient is one packed tensor that
        the kernel writes itself: no copy, no concatenation.
        """
        arguments.check_tensors(head=head)
        q = cls.__new__(cls)
        q._head, q._dim = head, arguments.check_packed(head, dim)
        q._mu, q._parameter = head.chunk(2, q._dim)
        q._finish(q._mu.shape, event_ndim, scale, bounds)
        return q

    def _finish(self, shape: torch.Size, event_ndim: int | None, scale: str, bounds) -> None:
        self._shape = shape
        event_ndim = max(1, len(shape) - 1) if event_ndim is None else event_ndim
        self.event_ndim = arguments.check_event_ndim(event_ndim, shape, "a posterior of shape")
        arguments.check_bounds(bounds)
        self._settings = {"scale": arguments.check_scale(scale), "bounds": bounds}

    # ---- moments ----

    @property
    def mean(self) -> Tensor:
        return self._mu if self._mu.shape == self._shape else self._mu.expand(self._shape)

    mode = mean

    @property
    def logvar(self) -> Tensor:
        """ln sigma^2 within the bounds, differentiable."""
        return self._logvar().to(self._parameter.dtype)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self._logvar()).to(self._parameter.dtype)

    @property
    def var(self) -> Tensor:
        return torch.exp(self._logvar()).to(self._parameter.dtype)

    def _given(self) -> tuple[Tensor, Tensor]:
        """mu and ln sigma^2 before they are broadcast; the latter in the dtype that the ops compute in, where there is
        something to compute: rounded to bfloat16, a logarithm would bias every density by tenths of a nat per
        dimension."""
        if self._settings == {"scale": "logvar", "bounds": None}:
            return self._mu, self._parameter
        parameter = self._parameter.to(reference.compute_dtype(self._parameter))
        parameter = reference.to_logvar(parameter, self._settings["scale"])
        return self._mu, reference.bound(parameter, self._settings["bounds"])

    def _broadcast(self) -> tuple[Tensor, Tensor]:
        """_given of the full shape: what is smaller is in float32, in which its gradient is summed."""
        mu, logvar = self._given()
        return arguments.expand(mu, self._shape), arguments.expand(logvar, self._shape)

    def _logvar(self) -> Tensor:
        return self._broadcast()[1]

    @property
    def shape(self) -> torch.Size:
        return self._shape

    # ---- the ops ----

    def rsample(
        self, *, num_samples: int | None = None, seed: int | Tensor | None = None, eps: Tensor | None = None
    ) -> Tensor:
        """As `fastkl.rsample_normal`."""
        settings = {"num_samples": num_samples, "seed": seed, "eps": eps, **self._settings}
        if self._head is not None:
            return rsample_normal_packed(self._head, self._dim, **settings)
        return rsample_normal(self._mu, self._parameter, **settings)

    def kl(self, prior: DiagonalNormal | None = None) -> Tensor:
        """KL(q || prior) in nats, one per datum; the prior is N(0, I) or another DiagonalNormal."""
        settings = {"event_ndim": self.event_ndim, **self._settings}
        if self._head is not None:
            return kl_normal_packed(self._head, self._dim, *_parameters(prior), **settings)
        return kl_normal(self._mu, self._parameter, *_parameters(prior), **settings)

    def kl_per_dim(self, prior: DiagonalNormal | None = None) -> Tensor:
        """KL(q || prior) of each latent dimension, averaged over the batch: [*event]."""
        settings = {"event_ndim": self.event_ndim, **self._settings}
        return kl_normal_per_dim(self._mu, self._parameter, *_parameters(prior), **settings)

    def rsample_kl(
        self, prior: DiagonalNormal | None = None, *, num_samples: int | None = None,
        seed: int | Tensor | None = None, eps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(rsample, kl) in one pass."""
        drawn = {"num_samples": num_samples, "seed": seed, "eps": eps}
        settings = {"event_ndim": self.event_ndim, **drawn, **self._settings}
        if self._head is not None:
            return rsample_kl_packed(self._head, self._dim, *_parameters(prior), **settings)
        return rsample_kl(self._mu, self._parameter, *_parameters(prior), **settings)

    def log_prob(self, z: Tensor) -> Tensor:
        """ln q(z) in nats, one per datum; z may have leading dimensions of samples."""
        return normal_log_prob(z, *self._broadcast(), event_ndim=self.event_ndim)

    def entropy(self) -> Tensor:
        """1/2 sum_d [ln(2 pi e) + logvar_d] in nats, one per datum."""
        return reference.normal_entropy(self._logvar().flatten(len(self.shape) - self.event_ndim))

    def __repr__(self) -> str:
        return f"DiagonalNormal(shape={tuple(self.shape)}, event_ndim={self.event_ndim})"


def _parameters(prior: DiagonalNormal | None) -> tuple[Tensor, ...]:
    if prior is None:
        return ()
    if not isinstance(prior, DiagonalNormal):
        raise TypeError(f"prior must be a fastkl.DiagonalNormal or None, got {type(prior).__name__}")
    return prior._given()
