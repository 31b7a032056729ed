"""The base class of priors that are mixtures of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from fastkl import distributions, reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._sampling import Seed
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob
from fastkl.ops.mixture.gmm_moments import gmm_moments
from fastkl.ops.mixture.gmm_responsibilities import gmm_responsibilities
from fastkl.ops.mixture.kl_gmm import kl_gmm
from fastkl.ops.mixture.kl_gmm_bounds import kl_gmm_bounds
from fastkl.ops.mixture.rsample_gmm import rsample_gmm, sample_gmm
from fastkl.ops.normal.rsample_normal import rsample_normal
from fastkl.priors import _relaxed
from fastkl.priors._prior import Prior, check_shape


class Mixture(NamedTuple):
    """The parameters of a mixture, in the ops' form: `fastkl.gmm_log_prob(z, **mixture.named())`."""

    logits: Tensor
    means: Tensor
    logvars: Tensor | None = None
    scale_tril: Tensor | None = None

    def named(self) -> Parameters:
        """The parameters by name. Dynamo of torch 2.8 does not trace _asdict."""
        return {
            "logits": self.logits, "means": self.means, "logvars": self.logvars, "scale_tril": self.scale_tril,
        }  # fmt: skip


class Parameters(TypedDict):
    """A mixture by the ops' names."""

    logits: Tensor
    means: Tensor
    logvars: Tensor | None
    scale_tril: Tensor | None


class Usage(NamedTuple):
    """The use of a mixture's components by some data."""

    shares: Tensor  # [K] mean responsibilities, which sum to 1
    entropy: Tensor  # [] entropy of the shares in nats; ln K if all components are used equally
    used: int  # number of components with more than a tenth of an equal share, 1 / (10 K)


def used(shares: Tensor) -> Tensor:
    """A mask [K] of the used components, those with more than a tenth of an equal share."""
    return shares > 0.1 / len(shares)


class MixturePrior(Prior):
    """log_prob, sample, kl and usage of a prior that is a mixture of Gaussians."""

    methods = ("mc", "upper", "lower", "relaxed")
    precision = "exact"

    def mixture(self) -> Mixture:
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """ln p(z) [*batch], by `fastkl.gmm_log_prob`."""
        return gmm_log_prob(z, **self.mixture().named(), precision=self.precision)

    def responsibilities(self, z: Tensor) -> Tensor:
        """ln p(k | z) [*batch, K], by `fastkl.gmm_responsibilities`."""
        return gmm_responsibilities(z, **self.mixture().named(), precision=self.precision)

    def kl(
        self, q, *, method="mc", num_samples=1, entropy="closed", gradient="plain", seed=None, tau: float | Tensor = 1.0
    ) -> Tensor:
        """KL(q || p) [*batch] by samples ("mc"), or its bound from above ("upper") or below ("lower"), by
        `fastkl.kl_gmm`; or the relaxed KL of `kl_relaxed` at temperature tau ("relaxed"), with the same samples.

        `entropy` and `gradient` apply to "mc" only.
        """
        self._check_estimator(method, entropy, gradient)
        mu, logvar, mixture = self._both(q)
        if method == "relaxed":
            num_samples = arguments.check_int("num_samples", num_samples, 1)
            seed = sampling.check_seed(seed, mu.device, "q"), 0
            dtype = reference.compute_dtype(mu, logvar)  # cast first: gradients of all parts are summed in this dtype
            mu, logvar = mu.to(dtype), logvar.to(dtype)
            z = rsample_normal(mu, logvar, num_samples=num_samples, seed=seed)
            return _relaxed.kl_relaxed(mu, logvar, z, mixture, tau, self.precision, seed, None)
        return kl_gmm(
            mu, logvar, **mixture.named(), method=method, num_samples=num_samples, entropy=entropy, gradient=gradient,
            seed=seed, precision=self.precision,
        )  # fmt: skip

    def kl_relaxed(
        self, q: distributions.DiagonalNormal, z: Tensor, tau: float | Tensor, *, seed: Seed | None = None,
        gumbel: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """KL(q || p) [*batch] with an explicit choice of the component, relaxed to be differentiable.

        1/L sum_l [KL(q || N(sum_k y_k m_k, diag (sum_k y_k sigma_k)^2)) + sum_k r_k (ln r_k - ln pi_k)],
        r = p(k | z_l), y = gumbel_softmax(ln r, tau)

        As tau -> 0, its mean over the Gumbel noise is sum_k r_k KL(q || N_k) + KL(r || pi). For every z_l this is an
        upper bound of KL(q || p), at least kl(method="upper"), and the objective of VaDE with q(k | x) = p(k | z_l). At
        larger tau it is no bound, because a component between two may be nearer than both. At tau = 0, y is one-hot and
        has no gradient, and r gets the gradient of the second term only.

        Args:
            z: reparameterised draws from q, [L, *batch, D]. Temporaries have the sizes L x batch x K and L x batch x D,
                never batch x K x D.
            tau: the temperature, as for `fastkl.gumbel_softmax`: a number, or a tensor, annealed without recompiling.
            seed, gumbel: the seed of the Gumbel noise, or the noise itself, [L, *batch, K].

        Raises:
            ValueError: the covariance is "full"; tau is negative.

        Source: Jiang et al. 2017, "Variational Deep Embedding", arXiv:1611.05148, equation 9; Jang, Gu and Poole 2017,
        arXiv:1611.01144.
        """
        mu, logvar, mixture = self._both(q)
        return _relaxed.kl_relaxed(mu, logvar, z, mixture, tau, self.precision, seed, gumbel)

    def _both(self, q: distributions.DiagonalNormal) -> tuple[Tensor, Tensor, Mixture]:
        """mu, ln sigma^2 [*batch, D] and the mixture, with checked shapes."""
        mixture = self.mixture()
        return *self._parameters_of(q, mixture.means.shape[-1], mixture.means), mixture

    def kl_bounds(self, q: distributions.DiagonalNormal) -> tuple[Tensor, Tensor]:
        """(lower, upper) bounds of KL(q || p), by `fastkl.kl_gmm_bounds`."""
        mu, logvar, mixture = self._both(q)
        return kl_gmm_bounds(mu, logvar, **mixture.named(), precision=self.precision)

    @torch.no_grad()
    def usage(self, z: Tensor) -> Usage:
        """The mean responsibility of every component for z [*batch, D], for instance the posterior means of a data set.
        It is one pass without a tensor of size data times components."""
        moments = gmm_moments(z, **self.mixture().named())
        if moments.log_prob.numel() == 0:
            raise ValueError(f"z must hold at least one datum, got {tuple(z.shape)}")
        shares = moments.counts / moments.counts.sum()
        return Usage(shares, torch.special.entr(shares).sum(), int(used(shares).sum()))

    def rsample(self, n: int | Sequence[int], *, seed: Seed | None = None, tau: float | Tensor = 1.0) -> Tensor:
        """n draws [n, D], or [*n, D], with the distribution of `sample` and with gradients.

        The gradients to the parameters of each draw's component are exact. Those to the weights come from a
        straight-through choice at temperature tau and are biased. The choice needs a tensor [n, K].

        Source: as `fastkl.rsample_gmm` with hard=True.
        """
        mixture, shape = self.mixture(), check_shape(n)
        size, count = mixture.means.shape[-1], math.prod(shape)
        if count == 0:
            return mixture.means[:0].view(*shape, size)
        z = rsample_gmm(**mixture.named(), tau=tau, hard=True, num_samples=count, seed=seed)
        return z.to(mixture.means.dtype).view(*shape, size)

    @torch.no_grad()
    def sample(
        self, n: int | Sequence[int], *, component: int | Tensor | None = None, seed: Seed | None = None
    ) -> Tensor:
        """n draws [n, D], or draws of a shape, [*n, D], without gradient, by `fastkl.sample_gmm`.

        Args:
            component: the component to draw from, an int, or a tensor [*n] of ints with one for each draw. None draws
                components by their weights.
            seed: as for `fastkl.rsample_gmm`.
        """
        mixture, shape = self.mixture(), check_shape(n)
        size, count = mixture.means.shape[-1], math.prod(shape)
        if count == 0:
            return mixture.means.new_empty(*shape, size)
        if component is None:
            z, _ = sample_gmm(**mixture.named(), num_samples=count, seed=seed)
            return z.to(mixture.means.dtype).view(*shape, size)
        components = mixture.means.shape[0]
        chosen = torch.as_tensor(component, device=mixture.means.device)
        kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        good = chosen.dtype in kinds and (chosen.dim() == 0 or chosen.shape == shape)
        if good and not torch.compiler.is_compiling():
            good = bool(0 <= chosen.min() <= chosen.max() < components)
        if not good:
            raise ValueError(
                f"component must be one int from 0 to {components - 1}, or {count} of them, got {component!r}"
            )
        chosen = chosen.flatten() if chosen.dim() > 1 else chosen
        # Mixtures of one component: one mixture for all draws, or one per draw.
        means = mixture.means if components == 1 else mixture.means[chosen].unsqueeze(chosen.dim())
        logvars, scale_tril = (
            t if t is None or len(t) == 1 else t[chosen].unsqueeze(chosen.dim()) for t in mixture[2:]
        )
        logits = mixture.logits.new_zeros(*chosen.shape, 1)
        each = count if chosen.dim() == 0 else 1
        z, _ = sample_gmm(logits, means, logvars, scale_tril=scale_tril, num_samples=each, seed=seed)
        return z.to(mixture.means.dtype).view(*shape, size)
