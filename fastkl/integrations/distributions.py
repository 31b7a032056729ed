"""fastkl inside torch.distributions: KL divergences of Gaussians, and densities of Gaussian mixtures.

    fastkl.integrations.distributions.enable()      # until disable(), or for a block: with distributions.enable():

| call | by |
|---|---|
| `kl_divergence(Normal, Normal)`, element by element | `fastkl.kl_normal` |
| `kl_divergence(Independent(Normal), Independent(Normal))` | `fastkl.kl_normal` |
| `kl_divergence` of `Independent(Normal)` and `MultivariateNormal`, new | `fastkl.kl_multivariate_normal` |
| `MixtureSameFamily(Categorical, Independent(Normal)).log_prob` | `fastkl.gmm_log_prob` |
| `kl_divergence(Independent(Normal), MixtureSameFamily)`, only with `mixture_kl=True` | `fastkl.kl_gmm`, one draw |

For float16 and bfloat16 the values are float32, in which they are accurate. Everything else is unchanged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from fastkl.integrations._switch import Attribute, Divergence, Layer, Switch, check_method, registered_kl
from fastkl.ops._scales import as_torch_takes
from fastkl.ops._torch import validate_sample
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob
from fastkl.ops.mixture.kl_gmm import kl_gmm
from fastkl.ops.multivariate.kl_multivariate_normal import kl_multivariate_normal
from fastkl.ops.normal.kl_normal import kl_normal

# On a CPU, plain torch is faster than an op's set-up below this number of elements, or of a mixture's terms.
SMALL_NORMAL, SMALL_MIXTURE = 16_384, 131_072


def _is_normal(distribution: Any) -> TypeGuard[Independent]:
    """Whether it is an Independent(Normal) whose classes compute the density as torch's do."""
    if not isinstance(distribution, Independent) or not isinstance(distribution.base_dist, Normal):
        return False
    own = type(distribution).log_prob, type(distribution.base_dist).log_prob
    return own == (Independent.log_prob, Normal.log_prob)


def _is_vector(distribution: Any) -> TypeGuard[Independent]:
    return _is_normal(distribution) and distribution.reinterpreted_batch_ndims == 1


def _have_own_kl(p: Normal, q: Normal) -> bool:
    """Whether torch prefers a KL that a user has registered for a subclass of Normal."""
    mine, others = (
        [kind for kind in type(each).__mro__ if issubclass(kind, Normal) and kind is not Normal] for each in (p, q)
    )
    pairs: list[tuple[type, type]] = [*itertools.product(mine, type(q).__mro__), *((Normal, kind) for kind in others)]
    return any(registered_kl(first, second, None) is not None for first, second in pairs)


TESTED = "2.13.0"
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
STANDARD: dict[str, Any] = {"scale": "std", "prior_scale": "std"}  # as in torch.distributions


def is_small(count: int, limit: int, *tensors: Tensor) -> bool:
    """Whether plain torch is faster, and as accurate because none has 16 bits."""
    return count < limit and all(tensor.device.type == "cpu" and tensor.itemsize > 2 for tensor in tensors)


def _kl_by_torch(p: Normal, q: Normal) -> Tensor:
    """The KL in as many operations as torch's formula, without its squares, which overflow and underflow."""
    log_ratio, standard = torch.log(p.scale / q.scale), (p.loc - q.loc) / q.scale
    x = log_ratio + log_ratio
    return 0.5 * (torch.expm1(x) - x + standard * standard)


def kl_of_normals(p: Normal, q: Normal, event_ndim: int = 0) -> Tensor:
    parameters = p.loc, p.scale, q.loc, q.scale
    if is_small(max(p.loc.numel(), q.loc.numel()), SMALL_NORMAL, *parameters):
        kl = _kl_by_torch(p, q)
        return kl.sum(tuple(range(-event_ndim, 0))) if event_ndim else kl  # torch sums all dimensions for ()
    return kl_normal(*as_torch_takes(*parameters), event_ndim=event_ndim, **STANDARD)


def kl_of_independents(stock: Callable[..., Tensor]) -> Callable[[Independent, Independent], Tensor]:
    def kl_of_independent(p: Independent, q: Independent) -> Tensor:
        ndim = p.reinterpreted_batch_ndims
        if not (_is_normal(p) and _is_normal(q)) or ndim != q.reinterpreted_batch_ndims:
            return stock(p, q)
        if _have_own_kl(p.base_dist, q.base_dist):
            return stock(p, q)
        return kl_of_normals(p.base_dist, q.base_dist, ndim)

    return kl_of_independent


def _unknown(p: torch.distributions.Distribution, q: torch.distributions.Distribution) -> Tensor:
    raise NotImplementedError(f"no KL is known from {p} to {q}")


def kl_to_multivariate(stock: Callable[..., Tensor] = _unknown) -> Callable[..., Tensor]:
    def kl(p: Independent, q: MultivariateNormal) -> Tensor:
        if not _is_vector(p):
            return stock(p, q)
        mu, std = as_torch_takes(p.base_dist.loc, p.base_dist.scale)
        return kl_multivariate_normal(mu, std, q.loc, q.scale_tril)

    return kl


def kl_from_multivariate(stock: Callable[..., Tensor] = _unknown) -> Callable[..., Tensor]:
    def kl(p: MultivariateNormal, q: Independent) -> Tensor:
        if not _is_vector(q):
            return stock(p, q)
        mu, std = as_torch_takes(q.base_dist.loc, q.base_dist.scale)
        return kl_multivariate_normal(p.loc, p.scale_tril, mu, std)

    return kl


def log_weights(mixture: Categorical) -> Tensor:
    """ln pi up to a constant. torch's `logits`, computed from probabilities, replace a weight of 0 by about 1e-7."""
    known = vars(mixture)  # the given parameter, and the other once it has been accessed
    if "logits" not in known:
        return mixture.probs.log()
    if "probs" not in known:
        return mixture.logits
    return mixture.logits.masked_fill((mixture.probs == 0) & (mixture.logits > -50), -math.inf)


def kl_to_mixture(stock: Callable[..., Tensor] = _unknown) -> Callable[..., Tensor]:
    def kl(p: Independent, q: MixtureSameFamily) -> Tensor:
        components = q.component_distribution
        if not (_is_vector(p) and _is_vector(components)):
            return stock(p, q)
        own, normal = p.base_dist, components.base_dist
        parameters = own.loc, own.scale, log_weights(q.mixture_distribution), normal.loc, normal.scale
        return kl_gmm(*as_torch_takes(*parameters), **STANDARD)

    return kl


def mixture_log_prob(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def log_prob(self, x):
        components = self.component_distribution
        if not _is_vector(components):
            return stock(self, x)
        normal, count = components.base_dist, components.batch_shape[-1]
        validate_sample(self, x)
        parameters = x, log_weights(self.mixture_distribution), normal.loc, normal.scale
        x, logits, means, stds = as_torch_takes(*parameters)
        x = x.to(torch.promote_types(x.dtype, means.dtype)).expand(*x.shape[:-1], means.shape[-1])
        if is_small(x.numel() * count, SMALL_MIXTURE, logits, means, stds):
            standard = (x.unsqueeze(-2) - means) / stds
            log_density = -0.5 * (standard * standard).sum(-1) - (stds.log().sum(-1) + x.shape[-1] * HALF_LOG_2_PI)
            return torch.logsumexp(log_density + logits.log_softmax(-1), -1)
        if self.batch_shape:  # one mixture per datum: x ends with the batch's dimensions
            batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
            x = x.expand(*batch, *x.shape[-1:])
            means, stds = (t.expand(*batch, *t.shape[-2:]) for t in (means, stds))
            logits = logits.expand(*batch, count)
        return gmm_log_prob(x, logits, means, stds, scale="std")

    return log_prob


def changes(*, mixture_kl: bool = False) -> list[Attribute | Divergence]:
    version = f"torch {torch.__version__} (tested with {TESTED})"
    check_method(MixtureSameFamily, "log_prob", ("self", "x"), version)
    found: list[Attribute | Divergence] = [
        Divergence(Normal, Normal, kl_of_normals),
        Divergence(Independent, Independent, kl_of_independents(registered_kl(Independent, Independent, _unknown))),
        Attribute(MixtureSameFamily, "log_prob", mixture_log_prob(MixtureSameFamily.log_prob)),
    ]
    for p, q, new in (
        (Independent, MultivariateNormal, kl_to_multivariate),
        (MultivariateNormal, Independent, kl_from_multivariate),
        *([(Independent, MixtureSameFamily, kl_to_mixture)] if mixture_kl else []),
    ):
        found.append(Divergence(p, q, new(registered_kl(p, q, _unknown))))
    return found


_switch = Switch(changes)


def enable(*, mixture_kl: bool = False) -> Layer:
    """Use fastkl in torch.distributions until `disable()`; as a context manager, until the block ends.

    Args:
        mixture_kl: also estimate `kl_divergence(Independent(Normal), MixtureSameFamily)`, for which torch has no
            formula, by one draw. Libraries that check for a formula, such as Pyro, then use another estimator.

    Raises:
        UnsupportedVersion: torch.distributions has other methods than fastkl expects. Nothing was replaced.

    >>> import torch, fastkl.integrations.distributions as distributions
    >>> mu, one = torch.tensor([0.05], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    >>> q, p = torch.distributions.Normal(mu, one), torch.distributions.Normal(0 * mu, one)
    >>> torch.distributions.kl_divergence(q, p)
    tensor([0.], dtype=torch.bfloat16)
    >>> with distributions.enable():
    ...     torch.distributions.kl_divergence(q, p)  # mu^2 / 2
    tensor([0.0013])
    """
    return _switch.enable(mixture_kl=mixture_kl)


def disable() -> None:
    """Undo the last `enable()` completely."""
    _switch.disable()
