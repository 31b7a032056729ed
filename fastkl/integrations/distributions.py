"""fastkl inside torch.distributions: KL divergences of Gaussians, and densities of Gaussian mixtures.

    fastkl.integrations.distributions.enable()      # until disable(), or for a block: with distributions.enable():

| call | by |
|---|---|
| `kl_divergence(Normal, Normal)`, element by element | `fastkl.kl_normal` |
| `kl_divergence(Independent(Normal), Independent(Normal))` | `fastkl.kl_normal` |
| `kl_divergence` of `Independent(Normal)` and `MultivariateNormal`, new | `fastkl.kl_multivariate_normal` |
| `MixtureSameFamily(Categorical, Independent(Normal)).log_prob` | `fastkl.gmm_log_prob` |
| `kl_divergence(Independent(Normal), MixtureSameFamily)`, only with `mixture_kl=True` | `fastkl.kl_gmm`, one draw |

Values in float16 and bfloat16 come in float32, in which they are right. What fastkl has no formula for stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.distributions import kl as torch_kl

from fastkl.integrations._switch import Attribute, Divergence, Switch, check_method
from fastkl.ops.gmm_log_prob import gmm_log_prob
from fastkl.ops.kl_gmm import kl_gmm
from fastkl.ops.kl_multivariate_normal import kl_multivariate_normal
from fastkl.ops.kl_normal import kl_normal

# Fewer terms than this, and the kernel's own set-up costs more than torch's formula does.
SMALL_MIXTURE = 4096


def _is_normal(distribution: Independent) -> bool:
    return isinstance(distribution.base_dist, Normal)


def _is_vector(distribution: Independent) -> bool:
    return _is_normal(distribution) and distribution.reinterpreted_batch_ndims == 1


def _log_variance(scale: Tensor) -> Tensor:
    """2 ln sigma, of a tensor that may be expanded: only the entries that differ are computed."""
    shape = scale.shape
    narrow = scale[tuple(slice(0, 1) if step == 0 else slice(None) for step in scale.stride())]
    return (2 * narrow.to(torch.promote_types(narrow.dtype, torch.float32)).log()).expand(shape)


def kl_of_normals(p: Normal, q: Normal) -> Tensor:
    return kl_normal(p.loc, p.scale, q.loc, _log_variance(q.scale), event_ndim=0, scale="std")


def kl_of_independents(stock: Callable[..., Tensor]) -> Callable[[Independent, Independent], Tensor]:
    def kl(p: Independent, q: Independent) -> Tensor:
        ndim = p.reinterpreted_batch_ndims
        if not (_is_normal(p) and _is_normal(q)) or ndim != q.reinterpreted_batch_ndims:
            return stock(p, q)
        return kl_normal(
            p.base_dist.loc, p.base_dist.scale, q.base_dist.loc, _log_variance(q.base_dist.scale), event_ndim=ndim,
            scale="std",
        )  # fmt: skip

    return kl


def _unknown(p: torch.distributions.Distribution, q: torch.distributions.Distribution) -> Tensor:
    raise NotImplementedError(f"no KL is known from {p} to {q}")


def kl_to_multivariate(stock: Callable[..., Tensor] = _unknown) -> Callable[..., Tensor]:
    def kl(p: Independent, q: MultivariateNormal) -> Tensor:
        if not _is_vector(p):
            return stock(p, q)
        return kl_multivariate_normal(p.base_dist.loc, p.base_dist.scale, q.loc, q.scale_tril)

    return kl


def kl_from_multivariate(stock: Callable[..., Tensor] = _unknown) -> Callable[..., Tensor]:
    def kl(p: MultivariateNormal, q: Independent) -> Tensor:
        if not _is_vector(q):
            return stock(p, q)
        return kl_multivariate_normal(p.loc, p.scale_tril, q.base_dist.loc, q.base_dist.scale)

    return kl


def log_weights(mixture: Categorical) -> Tensor:
    """ln pi up to a constant. torch's own `logits` of probabilities replace a weight of 0 by about 1e-7."""
    given = getattr(mixture, "_param", None)
    if given is not None and given is vars(mixture).get("probs"):
        return given.log()
    return mixture.logits


def kl_to_mixture(stock: Callable[..., Tensor] = _unknown) -> Callable[..., Tensor]:
    def kl(p: Independent, q: MixtureSameFamily) -> Tensor:
        components = q.component_distribution
        if not (_is_vector(p) and isinstance(components, Independent) and _is_vector(components)):
            return stock(p, q)
        normal = components.base_dist
        logvars = _log_variance(normal.scale)
        mu, logvar = p.base_dist.loc, _log_variance(p.base_dist.scale)
        return kl_gmm(mu, logvar, log_weights(q.mixture_distribution), normal.loc, logvars)

    return kl


def mixture_log_prob(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def log_prob(self, x):
        components = self.component_distribution
        if not (isinstance(components, Independent) and _is_vector(components)):
            return stock(self, x)
        normal, count = components.base_dist, self._num_component
        if x.numel() * count < SMALL_MIXTURE:
            return stock(self, x)
        if self._validate_args:
            self._validate_sample(x)
        logits = log_weights(self.mixture_distribution)
        means, logvars = normal.loc, _log_variance(normal.scale)
        if self.batch_shape:  # a mixture for each datum: x has the batch's dimensions last
            batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
            x = x.expand(*batch, *x.shape[-1:])
            means, logvars = (t.expand(*batch, *t.shape[-2:]) for t in (means, logvars))
            logits = logits.expand(*batch, count)
        return gmm_log_prob(x, logits, means, logvars)

    return log_prob


def changes(*, mixture_kl: bool = False) -> list[Attribute | Divergence]:
    version = f"torch {torch.__version__}"
    check_method(MixtureSameFamily, "log_prob", ("self", "x"), version)
    registered = torch_kl._KL_REGISTRY
    found: list[Attribute | Divergence] = [
        Divergence(Normal, Normal, kl_of_normals),
        Divergence(Independent, Independent, kl_of_independents(registered[Independent, Independent])),
        Attribute(MixtureSameFamily, "log_prob", mixture_log_prob(MixtureSameFamily.log_prob)),
    ]
    for p, q, new in (
        (Independent, MultivariateNormal, kl_to_multivariate),
        (MultivariateNormal, Independent, kl_from_multivariate),
        *([(Independent, MixtureSameFamily, kl_to_mixture)] if mixture_kl else []),
    ):
        found.append(Divergence(p, q, new(registered.get((p, q), _unknown))))
    return found


_switch = Switch(changes)


def enable(*, mixture_kl: bool = False) -> Switch:
    """Puts fastkl into torch.distributions until `disable()`; as a context manager, until the block ends.

    Args:
        mixture_kl: also estimate `kl_divergence(Independent(Normal), MixtureSameFamily)`, for which torch has no
            formula, by one draw. Libraries that ask whether there is a formula, as Pyro does, then take another
            estimator than before.

    Raises:
        UnsupportedVersion: torch.distributions has other methods than fastkl knows. Nothing was replaced.

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
    """Undoes the last `enable()`: everything is as it was."""
    _switch.disable()
