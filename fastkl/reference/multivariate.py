"""Gaussians with full covariances: KL divergence and squared Wasserstein distance, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype, exp_minus_one_minus, log_ratio


def kl_multivariate_normal(mu, scale_tril, prior_mu, prior_scale_tril) -> Tensor:
    """1/2 [tr(S_p^-1 S_q) + (m_p - m_q)^T S_p^-1 (m_p - m_q) - D + ln det S_p / det S_q], S = L L^T.

    A scale is a diagonal if it has no more dimensions than its mean.
    """
    dtype = compute_dtype(mu, scale_tril, prior_mu, prior_scale_tril)
    scales = [
        (scale.tril() if scale.dim() > mean.dim() else torch.diag_embed(scale)).to(dtype)
        for mean, scale in ((mu, scale_tril), (prior_mu, prior_scale_tril))
    ]
    difference = (prior_mu.to(dtype) - mu.to(dtype)).unsqueeze(-1)
    # With M = L_p^-1 L_q: |M|^2 and the determinant of M M^T, summed per element so that nothing cancels.
    stds = [scale.diagonal(dim1=-2, dim2=-1) for scale in scales]
    rows = stds[1].unsqueeze(-1)  # dividing by these first avoids overflow
    relative = torch.linalg.solve_triangular(scales[1] / rows, scales[0] / rows, upper=False)
    whitened = torch.linalg.solve_triangular(scales[1] / rows, difference / rows, upper=False)
    x = 2 * log_ratio(*stds)
    squares = relative.tril(-1).square().sum((-2, -1)) + whitened.square().sum((-2, -1))
    return 0.5 * (exp_minus_one_minus(x).sum(-1) + squares)


def wasserstein2_multivariate_normal(mu, scale_tril, prior_mu, prior_scale_tril) -> Tensor:
    """|m_q - m_p|^2 + tr(S_q + S_p - 2 (S_p^1/2 S_q S_p^1/2)^1/2), S = L L^T, by eigenvalues of symmetric matrices.

    A scale is a diagonal if it has no more dimensions than its mean.
    """
    dtype = compute_dtype(mu, scale_tril, prior_mu, prior_scale_tril)
    covariances = []
    for mean, scale in ((mu, scale_tril), (prior_mu, prior_scale_tril)):
        matrix = (scale.tril() if scale.dim() > mean.dim() else torch.diag_embed(scale)).to(dtype)
        covariances.append(matrix @ matrix.mT)
    values, vectors = torch.linalg.eigh(covariances[1])
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    fidelity = torch.linalg.eigvalsh(root @ covariances[0] @ root).clamp(min=0).sqrt().sum(-1)
    traces = sum(covariance.diagonal(dim1=-2, dim2=-1).sum(-1) for covariance in covariances)
    return (mu.to(dtype) - prior_mu.to(dtype)).square().sum(-1) + traces - 2 * fidelity
