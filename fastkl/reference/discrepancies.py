"""Maximum mean discrepancies: squared distances between distributions in the space of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype

MMD_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
MMD_KERNELS = ("imq", "rbf")
MMD_ESTIMATORS = ("unbiased", "biased")


def mmd(
    x: Tensor, y: Tensor, *, kernel: str = "imq", scales: tuple[float, ...] = MMD_SCALES, estimator: str = "unbiased"
) -> Tensor:
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y); "unbiased" excludes the pairs of a point with itself."""
    dtype = compute_dtype(x, y)
    x, y = x.to(dtype).flatten(1), y.to(dtype).flatten(1)
    xx, yy, xy = (mmd_kernel(_half_mean_square(a, b), kernel, scales) for a, b in ((x, x), (y, y), (x, y)))
    return _mean_of_pairs(xx, estimator) + _mean_of_pairs(yy, estimator) - 2 * xy.mean()


def mmd_kernel(t: Tensor, kernel: str, scales: tuple[float, ...]) -> Tensor:
    """The kernel as a function of t = d^2 / (2 D): sum_s C / (C + d^2), C = 2 D s, or sum_s exp(-d^2 / (2 D s))."""
    return sum(s / (s + t) if kernel == "imq" else torch.exp(-t / s) for s in scales)


def mmd_kernel_slope(t: Tensor, kernel: str, scales: tuple[float, ...]) -> Tensor:
    """The derivative of mmd_kernel."""
    return -sum(s / (s + t).square() if kernel == "imq" else torch.exp(-t / s) / s for s in scales)


def mmd_normal(
    mu: Tensor, logvar: Tensor | None = None, *, scales: tuple[float, ...] = MMD_SCALES, estimator: str = "unbiased"
) -> Tensor:
    """mmd with the RBF kernel, exact for N(0, I), of the points mu or of the mixture of the N(mu, exp(logvar))."""
    dtype = compute_dtype(mu, logvar)
    mu = mu.to(dtype).flatten(1)
    variance = torch.zeros_like(mu) if logvar is None else logvar.to(dtype).exp().flatten(1).expand_as(mu)
    pairs = rbf_of_normals(mu.unsqueeze(1) - mu, variance.unsqueeze(1) + variance, scales)
    return _mean_of_pairs(pairs, estimator) + mmd_normal_terms(mu, variance, scales)


def mmd_normal_terms(mu: Tensor, variance: Tensor, scales: tuple[float, ...]) -> Tensor:
    """The terms without pairs: -2 mean_i E k(z_i, e) + E k(e, e'), e and e' from N(0, I)."""
    prior = rbf_of_normals(torch.zeros_like(mu[:1]), torch.full_like(mu[:1], 2.0), scales)
    return prior.squeeze(0) - 2 * rbf_of_normals(mu, variance + 1, scales).mean()


def rbf_of_normals(difference: Tensor, variance: Tensor, scales: tuple[float, ...]) -> Tensor:
    """sum_s E exp(-|u|^2 / (2 g)), g = D s, u from N(difference, diag variance), over the last dimension:
    prod_d (g / (g + variance))^(1/2) exp(-difference^2 / (2 (g + variance)))."""
    total = difference.new_zeros(difference.shape[:-1])
    for s in scales:
        g = difference.shape[-1] * s
        logs = torch.log1p(variance / g) + difference.square() / (g + variance)
        total = total + torch.exp(-0.5 * logs.sum(-1))
    return total


def _half_mean_square(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x.unsqueeze(1) - y).square().mean(-1)


def _mean_of_pairs(k: Tensor, estimator: str) -> Tensor:
    if estimator == "biased":
        return k.mean()
    return (k.sum() - k.diagonal().sum()) / (k.shape[0] * (k.shape[0] - 1))
