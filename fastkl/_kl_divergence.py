"""torch.distributions.kl_divergence for a DiagonalNormal and other distributions: one KL per datum, in nats.

The KL sums over the DiagonalNormal's event; a Normal or an Independent(Normal) is broadcast to its shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, MultivariateNormal, Normal, register_kl

from fastkl.distributions import DiagonalNormal
from fastkl.ops._scales import as_torch_takes
from fastkl.ops.mixture.kl_gmm import kl_gmm
from fastkl.ops.multivariate.kl_multivariate_normal import kl_multivariate_normal
from fastkl.priors import Prior


def _as_posterior(p: Normal | Independent, like: DiagonalNormal) -> DiagonalNormal:
    if isinstance(p, Independent):
        if not isinstance(p.base_dist, Normal):
            raise NotImplementedError(
                f"no KL between a DiagonalNormal and an Independent({type(p.base_dist).__name__})"
            )
        if len(p.event_shape) != like.event_ndim:
            shapes = f"{tuple(p.event_shape)}, the DiagonalNormal of shape {tuple(like.event_shape)}"
            raise ValueError(f"the Independent(Normal) has events of shape {shapes}")
        p = p.base_dist
    mu, std, *_ = as_torch_takes(p.loc, p.scale, *like.tensors)
    mu, std = (tensor.expand(torch.broadcast_shapes(tensor.shape, like.shape)) for tensor in (mu, std))
    return DiagonalNormal(mu, std, scale="std", event_ndim=like.event_ndim)


register_kl(DiagonalNormal, DiagonalNormal)(DiagonalNormal.kl)


@register_kl(DiagonalNormal, Normal)
@register_kl(DiagonalNormal, Independent)
def _to_normal(q: DiagonalNormal, p: Normal | Independent) -> Tensor:
    return q.kl(_as_posterior(p, q))


@register_kl(Normal, DiagonalNormal)
@register_kl(Independent, DiagonalNormal)
def _from_normal(p: Normal | Independent, q: DiagonalNormal) -> Tensor:
    return _as_posterior(p, q).kl(q)


@register_kl(DiagonalNormal, MultivariateNormal)
def _to_multivariate_normal(q: DiagonalNormal, p: MultivariateNormal) -> Tensor:
    mu, logvar = q.vectors()
    return kl_multivariate_normal(mu, torch.exp(0.5 * logvar), p.loc, p.scale_tril)


@register_kl(MultivariateNormal, DiagonalNormal)
def _from_multivariate_normal(p: MultivariateNormal, q: DiagonalNormal) -> Tensor:
    mu, logvar = q.vectors()
    return kl_multivariate_normal(p.loc, p.scale_tril, mu, torch.exp(0.5 * logvar))


@register_kl(DiagonalNormal, MixtureSameFamily)
def _to_mixture(q: DiagonalNormal, p: MixtureSameFamily) -> Tensor:
    """An unbiased estimate with one draw, by fastkl.kl_gmm: the KL has no closed form."""
    components, logits = p.component_distribution, p.mixture_distribution.logits
    if isinstance(components, MultivariateNormal):
        return kl_gmm(*q.vectors(), logits, components.loc, scale_tril=components.scale_tril)
    if isinstance(components, Independent) and isinstance(components.base_dist, Normal) and len(p.event_shape) == 1:
        normal = components.base_dist
        return kl_gmm(*q.vectors(), logits, normal.loc, normal.scale, prior_scale="std")
    raise NotImplementedError(f"no KL from a DiagonalNormal to a mixture of {components}")


@register_kl(DiagonalNormal, Prior)
def _to_prior(q: DiagonalNormal, p: Prior) -> Tensor:
    return p.kl(q)
