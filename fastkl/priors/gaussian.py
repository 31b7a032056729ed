"""A single Gaussian as prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkl import distributions
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._sampling import Seed
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.ops.normal.rsample_normal import draw_normal
from fastkl.priors._prior import Prior, check_shape
from fastkl.reference import Stream


class _Gaussian(Prior):
    """One Gaussian, whose KL has a closed form."""

    methods = ("closed", "mc", "upper", "lower", "relaxed")
    dim: int
    mu: Tensor
    logvar: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.dim = arguments.check_int("dim", dim, 1)

    def kl(
        self, q, *, method="closed", num_samples=1, entropy="closed", gradient="plain", seed=None, tau=1.0
    ) -> Tensor:
        """KL(q || p) [*batch] in closed form. All other arguments are checked and ignored; they let priors be
        exchanged without other changes."""
        self._check_estimator(method, entropy, gradient)
        self._check_posterior(q, self.dim)
        return self._closed_form(q)

    def _closed_form(self, q: distributions.DiagonalNormal) -> Tensor:
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        return normal_log_prob(self._check_latent(z), self.mu, self.logvar, event_ndim=1)

    def rsample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        shape = (*check_shape(n), self.dim)
        seed = sampling.check_seed(seed, self.mu.device, "the prior")
        return draw_normal(Stream.PRIOR, shape, self.mu, self.logvar, seed)

    @torch.no_grad()
    def sample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        return self.rsample(n, seed=seed)


class StandardNormal(_Gaussian):
    """N(0, I), a prior without parameters.

    >>> import torch, fastkl
    >>> prior = fastkl.priors.StandardNormal(3)
    >>> prior.kl(fastkl.DiagonalNormal(torch.ones(2, 3), torch.zeros(2, 3)))
    tensor([1.5000, 1.5000])
    """

    place: Tensor

    def __init__(self, dim: int):
        super().__init__(dim)
        # Empty, it has only a dtype and a device: to_empty() leaves no values that nothing would restore.
        self.register_buffer("place", torch.empty(0), persistent=False)

    @property
    def mu(self) -> Tensor:  # type: ignore[override]
        return self.place.new_zeros(()).expand(self.dim)

    logvar = mu  # type: ignore[assignment]

    def _closed_form(self, q: distributions.DiagonalNormal) -> Tensor:
        return q.kl()


class LearnedNormal(_Gaussian):
    """N(mu, diag exp(logvar)) with learned parameters mu, logvar [D], initially N(0, I).

    >>> import torch, fastkl
    >>> prior = fastkl.priors.LearnedNormal(3)
    >>> prior.kl(fastkl.DiagonalNormal(torch.ones(2, 3), torch.zeros(2, 3))).mean().backward()
    >>> prior.mu.grad
    tensor([-1., -1., -1.])
    """

    def __init__(self, dim: int):
        super().__init__(dim)
        self.mu, self.logvar = (nn.Parameter(torch.zeros(self.dim)) for _ in range(2))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.mu.zero_()
        self.logvar.zero_()

    def _closed_form(self, q: distributions.DiagonalNormal) -> Tensor:
        parameters = (parameter.view(q.event_shape) for parameter in (self.mu, self.logvar))
        return q.kl(distributions.DiagonalNormal(*parameters, event_ndim=q.event_ndim))
