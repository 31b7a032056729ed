"""Gaussian mixtures: the log-density, its parts, and the divergence to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype
from fastkl.reference.likelihood import normal_log_prob
from fastkl.reference.noise import normal_noise


def gmm_joint_log_prob(z, logits, means, logvars=None, *, scale_tril=None, logvar=None, form="point") -> Tensor:
    """ln pi_k + (the term of component k at z, given by `form`), [..., K]; pi = softmax(logits).

    With q = N(z, diag exp(logvar)): "point" is ln N(z; m_k, S_k); "expected" is E_q[ln N(.; m_k, S_k)]; "convolved" is
    ln E_q[N(.; m_k, S_k)] = ln N(z; m_k, S_k + exp(logvar)). z is [..., D], means [..., K, D]; logvars broadcasts with
    means, and is 0 if absent; scale_tril is [..., K, D, D], and its part above the diagonal is ignored.
    """
    dtype = compute_dtype(z, logits, means, logvars, scale_tril, logvar)
    log_weights = torch.log_softmax(logits.to(dtype), -1)
    difference = z.to(dtype).unsqueeze(-2) - means.to(dtype)
    variance: Any = None if logvar is None else logvar.to(dtype).exp().unsqueeze(-2)
    if scale_tril is not None:
        scale = scale_tril.to(dtype).tril()
        if form == "convolved":
            covariance = scale @ scale.mT + torch.diag_embed(variance.expand(difference.shape))
            scale = torch.linalg.cholesky(covariance)
        log_determinant = 2 * scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        scale = scale.expand(*difference.shape, difference.shape[-1])
        whitened = torch.linalg.solve_triangular(scale, difference.unsqueeze(-1), upper=False).squeeze(-1)
        quadratic = whitened.square().sum(-1)
        if form == "expected":
            precision_root = torch.linalg.solve_triangular(
                scale, torch.eye(scale.shape[-1], dtype=dtype, device=scale.device), upper=False
            )
            quadratic = quadratic + (precision_root.square().sum(-2) * variance).sum(-1)
    else:
        logvars = means.new_zeros(()) if logvars is None else logvars
        spread = logvars.to(dtype).expand(torch.broadcast_shapes(logvars.shape, means.shape))
        if form == "convolved":
            spread = torch.log(spread.exp() + variance)
        root = torch.exp(-0.5 * spread)
        quadratic = (difference * root).square().sum(-1)
        if form == "expected":
            quadratic = quadratic + (variance * root.square()).sum(-1)
        log_determinant = spread.sum(-1)
    constant = z.shape[-1] * math.log(2 * math.pi)
    return log_weights - 0.5 * (quadratic + log_determinant + constant)


def gmm_log_prob(z, logits, means, logvars=None, *, scale_tril=None) -> Tensor:
    """ln p(z) = logsumexp_k [ln pi_k + ln N(z; m_k, S_k)]."""
    return gmm_joint_log_prob(z, logits, means, logvars, scale_tril=scale_tril).logsumexp(-1)


def gmm_responsibilities(z, logits, means, logvars=None, *, scale_tril=None) -> Tensor:
    """ln p(k | z) = ln pi_k + ln N(z; m_k, S_k) - ln p(z)."""
    return gmm_joint_log_prob(z, logits, means, logvars, scale_tril=scale_tril).log_softmax(-1)


def normal_entropy(logvar, dtype=None) -> Tensor:
    """H(N(., diag exp(logvar))) = 1/2 sum_d [logvar_d + ln 2 pi e], in `dtype`, or else logvar's compute dtype."""
    return 0.5 * (logvar.to(dtype or compute_dtype(logvar)) + math.log(2 * math.pi * math.e)).sum(-1)


def kl_gmm(
    mu, logvar, logits, means, logvars=None, *, scale_tril=None, method="mc", num_samples=1, entropy="closed",
    gradient="plain", seed=None, eps=None,
) -> Tensor:  # fmt: skip
    """KL(q || mixture): by samples ("mc"), or a bound from above ("upper") or below ("lower").

    gradient="stl" omits the gradient of ln q(z; mu, logvar) in mu and logvar at fixed z.
    """
    mu, logvar = torch.broadcast_tensors(mu, logvar)
    if method != "mc":
        form = {"upper": "expected", "lower": "convolved"}[method]
        joint = gmm_joint_log_prob(mu, logits, means, logvars, scale_tril=scale_tril, logvar=logvar, form=form)
        return -normal_entropy(logvar, joint.dtype) - joint.logsumexp(-1)
    dtype = compute_dtype(mu, logvar, logits, means, logvars, scale_tril)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    eps = (normal_noise(seed, mu.shape, num_samples) if eps is None else eps).to(dtype)
    z = mu + torch.exp(0.5 * logvar) * eps
    cross = gmm_log_prob(z, logits, means, logvars, scale_tril=scale_tril).mean(0)
    fixed_mu, fixed_logvar = (mu.detach(), logvar.detach()) if gradient == "stl" else (mu, logvar)
    log_q = normal_log_prob(z, fixed_mu, fixed_logvar, event_ndim=1).mean(0)
    if entropy == "closed":  # the entropy's value with log_q's gradient, which for "plain" is equal
        log_q = -normal_entropy(logvar).detach() + (log_q - log_q.detach())
    return log_q - cross


def kl_gmm_bounds(mu, logvar, logits, means, logvars=None, *, scale_tril=None) -> tuple[Tensor, Tensor]:
    """(lower, upper) bounds on KL(q || mixture)."""
    inputs = (mu, logvar, logits, means, logvars)
    lower, upper = (kl_gmm(*inputs, scale_tril=scale_tril, method=method) for method in ("lower", "upper"))
    return lower, upper
