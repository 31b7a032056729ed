"""The closed-form gradients of sampling and KL, in differentiable torch ops: for tensors without kernels, and for
gradients of gradients. One formula for the four ops that share it; a test holds it against autograd of the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference


def unpack(q: list[Tensor], packed_dim: int) -> list[Tensor]:
    """[mu, parameter] from [mu, parameter], or from [head] that packs both along packed_dim."""
    return q if len(q) == 2 else list(q[0].chunk(2, packed_dim))


def normal_gradients(
    q: list[Tensor], packed_dim: int, prior: list[Tensor], scale: str, bounds, *,
    dkl: Tensor | float | None = None, dz: Tensor | None = None, eps: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """One gradient for each tensor of q and prior, in its dtype.

    dkl broadcasts with mu: the gradient of every element's KL. dz is the gradient of mu + sigma eps, [L, *shape] where
    eps is, else [*shape].
    """
    inputs = [*unpack(q, packed_dim), *prior]
    dtype = reference.compute_dtype(*inputs)
    mu, parameter, *rest = (tensor.to(dtype) for tensor in inputs)
    raw = reference.to_logvar(parameter, scale)
    logvar = reference.bound(raw, bounds)
    gradients = [0.0, 0.0, 0.0, 0.0]  # mu, logvar, prior_mu, prior_logvar
    if dz is not None:
        dz, eps = dz.to(dtype), eps.to(dtype)
        dsigma = dz * eps
        if dz.dim() > mu.dim():
            dz, dsigma = dz.sum(0), dsigma.sum(0)
        gradients[:2] = dz, 0.5 * torch.exp(0.5 * logvar) * dsigma
    if dkl is not None:
        kl_mu, kl_logvar, kl_prior_logvar = reference.kl_terms_gradient(mu, logvar, *rest)
        kl_mu = dkl * kl_mu
        gradients = [gradients[0] + kl_mu, gradients[1] + dkl * kl_logvar, -kl_mu, dkl * kl_prior_logvar]
    dmu, dlogvar, *dprior = gradients
    dparameter = reference.bound_gradient(dlogvar, raw, bounds) * reference.to_logvar_gradient(parameter, scale)
    dq = [dmu, dparameter] if len(q) == 2 else [torch.cat([dmu, dparameter], packed_dim)]
    dprior = [gradient.sum_to_size(tensor.shape) for gradient, tensor in zip(dprior, prior)]
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(dq + dprior, [*q, *prior])]
