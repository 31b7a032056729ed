"""A mixture of Gaussians with learned parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkl import distributions, reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._sharding import by_parts
from fastkl.ops.normal.rsample_normal import rsample_normal
from fastkl.priors._fit import FitRecord, em_step, hard_start, kmeans
from fastkl.priors.mixture import Mixture, MixturePrior

COVARIANCES = ("diag", "spherical", "tied", "full")


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(arguments.check_int("seed", seed, -(2**63)))


@by_parts
def _triangles(log_diagonal: Tensor, lower: Tensor) -> Tensor:
    """[K, D, D] of the diagonals' logarithms [K, D] and the entries below them [K, D (D - 1) / 2], row by row."""
    size = log_diagonal.shape[1]
    rows, columns = torch.tril_indices(size, size, -1, device=lower.device)
    scale = torch.diag_embed(log_diagonal.exp())
    scale[:, rows, columns] = lower
    return scale


class GaussianMixture(MixturePrior):
    """sum_k pi_k N(m_k, S_k), pi = softmax(logits), with learned parameters.

    Initially the weights are equal, every variance is 1/2 and the means are drawn from N(0, I/2), which gives the
    mixture the moments of N(0, I). To start near the data, train with another prior first, then `fit` this one to the
    posteriors.

    Args:
        components, dim: K and D.
        covariance: "diag", "spherical" (one variance per component), "tied" (one diagonal that all components share) or
            "full". The parameters are `logits` [K], `means` [K, D] and `logvars` [K, D], [K, 1] or [1, D]; for "full"
            `log_diagonal` [K, D] and `lower` [K, D (D - 1) / 2], the triangle L_k of S_k = L_k L_k^T row by row.
        precision: as for `fastkl.gmm_log_prob`.

    Source: Dilokthanakul et al. 2016, arXiv:1611.02648.

    >>> import torch, fastkl
    >>> prior = fastkl.priors.GaussianMixture(components=5, dim=2)
    >>> q = fastkl.DiagonalNormal(torch.randn(8, 2), torch.zeros(8, 2))
    >>> prior.kl(q, num_samples=4).mean().backward()
    >>> prior.means.grad.shape, prior.sample(3).shape
    (torch.Size([5, 2]), torch.Size([3, 2]))
    """

    dim: int

    def __init__(self, components: int, dim: int, covariance: str = "diag", *, precision: str = "exact"):
        super().__init__()
        arguments.check_choice("covariance", covariance, COVARIANCES)
        self.components, self.dim = (
            arguments.check_int(name, size, 1) for name, size in (("components", components), ("dim", dim))
        )
        self.covariance, self.precision = covariance, precision
        self.logits = nn.Parameter(torch.empty(self.components))
        self.means = nn.Parameter(torch.empty(self.components, self.dim))
        if covariance == "full":
            self.log_diagonal = nn.Parameter(torch.empty(self.components, self.dim))
            self.lower = nn.Parameter(torch.empty(self.components, self.dim * (self.dim - 1) // 2))
        else:
            rows, columns = 1 if covariance == "tied" else self.components, 1 if covariance == "spherical" else self.dim
            self.logvars = nn.Parameter(torch.empty(rows, columns))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.logits.zero_()
        self.means.normal_(0.0, 0.5**0.5)
        logvar = math.log(0.5)
        if self.covariance == "full":
            self.log_diagonal.fill_(0.5 * logvar)
            self.lower.zero_()
        else:
            self.logvars.fill_(logvar)

    @property
    def scale_tril(self) -> Tensor:
        """L_k [K, D, D] of any covariance, in float32 for 16-bit parameters: an exponential rounded to bfloat16 would
        bias every density by tenths of a nat per dimension."""
        dtype = reference.compute_dtype(self.means)
        if self.covariance != "full":
            return torch.diag_embed(torch.exp(0.5 * self.logvars.to(dtype)).expand(self.means.shape))
        return _triangles(self.log_diagonal.to(dtype), self.lower.to(dtype))

    def mixture(self) -> Mixture:
        if self.covariance == "full":
            return Mixture(self.logits, self.means, scale_tril=self.scale_tril)
        return Mixture(self.logits, self.means, self.logvars)

    def fit(
        self, z: Tensor | distributions.DiagonalNormal, *, iterations: int = 100, tolerance: float = 1e-3,
        init: str | Tensor = "k-means++", regularisation: float = 1e-6, seed: int | None = None,
        progress: Callable[[int, float], Any] | None = None, num_samples: int = 10,
    ) -> FitRecord:  # fmt: skip
        """Maximum likelihood by expectation maximisation, in place; each step equals scikit-learn's GaussianMixture.

        Args:
            z: data [*batch, D], or a batch of posteriors, a fastkl.DiagonalNormal. The fit to posteriors approximates
                their average, the prior with the least mean KL; a fit to their means alone would be too narrow. The
                computation is in float64 for float64 input, else in float32.
            iterations, tolerance: the fit ends after `iterations`, or when the mean log-likelihood changes by less
                than `tolerance` (nats).
            init: "k-means++" (seeding, then Lloyd's iterations), "current" (the present parameters), or initial means
                [K, D]. The first and the last take weights and covariances from the data nearest to each mean.
            regularisation: added to every variance, in units of z squared.
            seed: for "k-means++" and the draws from posteriors, an int, with the same fit on every process; None takes
                it from torch's generator.
            num_samples: draws per posterior to fit to. "k-means++" uses the posterior means, which show clusters more
                clearly.
            progress: called as progress(iteration, log_likelihood) after every iteration.

        Returns:
            FitRecord(log_likelihood, converged): the mean log-likelihood of the data, per datum, before each
            iteration's step.

        A component without data keeps its mean and gets a weight of about 0. Its covariance grows by `regularisation`
        in every iteration; a tied one follows the others. After an exception of `progress` or Ctrl-C, the module has
        the parameters of the last complete iteration.

        Raises:
            TypeError: z is neither a floating-point tensor nor a fastkl.DiagonalNormal.
            ValueError: z has the wrong shape, fewer data (or posteriors) than components, or non-finite numbers; init
                is unknown; a covariance became singular, which regularisation = 0 allows.

        Source: Bishop 2006, "Pattern Recognition and Machine Learning", section 9.2.2; Arthur and Vassilvitskii 2007,
        "k-means++: the advantages of careful seeding".

        >>> import torch, fastkl
        >>> z = torch.cat([torch.randn(500, 2) - 5, torch.randn(500, 2) + 5])
        >>> prior = fastkl.priors.GaussianMixture(components=2, dim=2)
        >>> prior.fit(z).converged
        True
        >>> prior.means.sort(0).values.round().tolist()
        [[-5.0, -5.0], [5.0, 5.0]]
        """
        iterations = arguments.check_int("iterations", iterations, 1)
        for name, value in (("tolerance", tolerance), ("regularisation", regularisation)):
            if not value >= 0:
                raise ValueError(f"{name} must be a number, 0 or more, got {value!r}")
        rows, means = self._rows(z, num_samples, seed)
        state = self._start(rows, means, init, regularisation, _generator(seed, rows.device))
        history, converged = [], False
        try:
            for iteration in range(1, iterations + 1):
                log_likelihood, state = em_step(rows, state, self.covariance, regularisation)
                history.append(log_likelihood)
                if progress is not None:
                    progress(iteration, log_likelihood)
                converged = iteration > 1 and abs(history[-1] - history[-2]) < tolerance
                if converged:
                    break
        finally:
            self._assign(*state)
        return FitRecord(history, converged)

    @torch.no_grad()
    def _rows(self, z, num_samples: int, seed: int | None) -> tuple[Tensor, Tensor]:
        """(rows for the fit [N, D], rows for k-means++): the data twice, or draws and means of the posteriors."""
        num_samples = arguments.check_int("num_samples", num_samples, 1)
        if isinstance(z, distributions.DiagonalNormal):
            parameters = self._parameters_of(z, self.dim)
            arguments.check_tensors(z=parameters[0], parameters=self.means)
            dtype = reference.compute_dtype(*parameters)
            mu, logvar = (tensor.detach().reshape(-1, self.dim).to(dtype) for tensor in parameters)
            shared = None if seed is None else (seed, 0)
            drawn = rsample_normal(mu, logvar, num_samples=num_samples, seed=shared)
            rows, means = drawn.flatten(0, 1), mu
        else:
            arguments.check_tensors(z=z, parameters=self.means)
            rows = means = self._check_latent(z).detach().reshape(-1, self.dim).to(reference.compute_dtype(z))
        if len(means) < self.components:
            raise ValueError(f"z must hold at least {self.components} data, one per component, got {len(means)}")
        if not all(tensor.isfinite().all() for tensor in (rows, means)):
            raise ValueError("z must be finite, but holds NaN or infinite numbers")
        return rows, means

    def _start(self, rows: Tensor, means: Tensor, init: str | Tensor, regularisation: float, generator) -> tuple:
        if isinstance(init, str) and init == "current":
            return tuple(None if tensor is None else tensor.detach().to(rows.dtype) for tensor in self.mixture())
        if isinstance(init, Tensor):
            if init.shape != self.means.shape:
                raise ValueError(f"init must be {tuple(self.means.shape)}, got {tuple(init.shape)}")
            centres = init.detach().to(rows)
            if not centres.isfinite().all():
                raise ValueError("init must be finite, but holds NaN or infinite numbers")
        elif init == "k-means++":
            centres = kmeans(means, self.components, generator)
        else:
            raise ValueError(f"init must be 'k-means++', 'current' or a tensor of means, got {init!r}")
        return hard_start(rows, centres, self.covariance, regularisation)

    @torch.no_grad()
    def _assign(self, logits, means, logvars, scale_tril) -> None:
        self.logits.copy_(logits)
        self.means.copy_(means)
        if scale_tril is None:
            self.logvars.copy_(logvars)
        else:
            rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=scale_tril.device)
            self.log_diagonal.copy_(scale_tril.diagonal(dim1=-2, dim2=-1).log())
            self.lower.copy_(scale_tril[:, rows, columns])

    def extra_repr(self) -> str:
        return f"components={self.components}, dim={self.dim}, covariance={self.covariance!r}"
