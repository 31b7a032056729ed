"""A prior for the vector of channels at each position of an image, a volume or a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkl import distributions
from fastkl.ops import _arguments as arguments
from fastkl.ops._sampling import Seed
from fastkl.priors._prior import Prior, check_shape


class PerPosition(Prior):
    """The same prior at every position, independently: ln p(z) = sum over positions of ln p(channels there).

    Args:
        prior: the prior of the C channels, one of fastkl.priors or a custom one.
        shape: the shape of the positions: (H, W) for latents [N, C, H, W], or an int for [N, C, T].

    KLs, log-densities and draws are those of the whole latent, flattened with channels first, so objectives take it
    like any other prior. Settings of `kl` are passed to the inner prior.

    Raises:
        TypeError: prior has no log_prob. ValueError: a latent does not have C channels at these positions.

    >>> import torch, fastkl
    >>> prior = fastkl.priors.PerPosition(fastkl.priors.GaussianMixture(components=5, dim=4), (8, 8))
    >>> q = fastkl.DiagonalNormal(torch.randn(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))
    >>> prior.kl(q).shape, prior.sample(3).view(3, 4, 8, 8).shape
    (torch.Size([2]), torch.Size([3, 4, 8, 8]))
    """

    prior: Prior

    def __init__(self, prior: Prior, shape: int | Sequence[int]):
        super().__init__()
        if not hasattr(prior, "log_prob"):
            raise TypeError(f"prior must be one of fastkl.priors, got {type(prior).__name__}")
        sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
        self.shape = tuple(arguments.check_int("shape", size, 1) for size in sizes)
        self.prior, self.positions = prior, math.prod(self.shape)
        channels = getattr(prior, "dim", None)
        self.dim = None if channels is None else channels * self.positions

    @property
    def methods(self) -> tuple[str, ...]:  # type: ignore[override]  # those of the prior, whatever they become
        return self.prior.methods

    def log_prob(self, z: Tensor) -> Tensor:
        """ln p(z) [*batch] of z [*batch, C x positions]."""
        return self.prior.log_prob(self._rows("z", z)).sum(-1)

    def kl(self, q: distributions.DiagonalNormal, **settings: Any) -> Tensor:
        """KL(q || p) [*batch], the sum over positions of the inner prior's KL."""
        return self.prior.kl(self._posteriors(q), **settings).sum(-1)

    def kl_relaxed(self, q: distributions.DiagonalNormal, z: Tensor, tau: float | Tensor, **settings: Any) -> Tensor:
        """The mixture's kl_relaxed, summed over positions; gumbel has the shape [L, *batch, positions, K]."""
        return self.prior.kl_relaxed(self._posteriors(q), self._rows("z", z), tau, **settings).sum(-1)

    def fit(self, z: Tensor | distributions.DiagonalNormal, **settings: Any) -> Any:
        """Fit the inner prior to the channels at all positions of latents [*batch, C x positions] or of posteriors."""
        rows = self._posteriors(z) if isinstance(z, distributions.DiagonalNormal) else self._rows("z", z)
        return self.prior.fit(rows, **settings)

    def sample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        return self._latents(self.prior.sample, n, seed)

    def rsample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        return self._latents(self.prior.rsample, n, seed)

    def _latents(self, draw, n: int | Sequence[int], seed: Seed | None) -> Tensor:
        shape = check_shape(n)
        rows = draw(math.prod(shape) * self.positions, seed=seed)
        return rows.view(*shape, self.positions, rows.shape[-1]).mT.flatten(-2)

    def _rows(self, name: str, z: Tensor) -> Tensor:
        """[..., C x positions] -> [..., positions, C]."""
        arguments.check_tensors(**{name: z})
        if z.dim() == 0 or z.shape[-1] % self.positions or self.dim not in (None, z.shape[-1]):
            expected = f"C x {self.positions}" if self.dim is None else f"{self.dim}"
            raise ValueError(f"{name} must be (*batch, {expected}), channels at {self.shape}, got {tuple(z.shape)}")
        return z.unflatten(-1, (-1, self.positions)).mT

    def _posteriors(self, q: distributions.DiagonalNormal) -> distributions.DiagonalNormal:
        parameters = self._parameters_of(q, self.dim)
        return distributions.DiagonalNormal(*(self._rows("q", tensor) for tensor in parameters), event_ndim=1)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
