"""Sums over the pairs of a batch: the maximum mean discrepancy, and the decomposition of the KL."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype, standardise, to_logvar
from fastkl.reference.likelihood import normal_log_prob

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


def mmd_kernel(t: Tensor, kernel: str, scales: Sequence[float]) -> Tensor:
    """The kernel as a function of t = d^2 / (2 D): sum_s C / (C + d^2), C = 2 D s, or sum_s exp(-d^2 / (2 D s))."""
    return functools.reduce(torch.add, (s / (s + t) if kernel == "imq" else torch.exp(-t / s) for s in scales))


def mmd_kernel_slope(t: Tensor, kernel: str, scales: Sequence[float]) -> Tensor:
    """The derivative of mmd_kernel."""
    slopes = (s / (s + t).square() if kernel == "imq" else torch.exp(-t / s) / s for s in scales)
    return -functools.reduce(torch.add, slopes)


def mmd_normal(
    mu: Tensor, logvar: Tensor | None = None, *, scales: tuple[float, ...] = MMD_SCALES, estimator: str = "unbiased",
    scale: str = "logvar",
) -> Tensor:  # fmt: skip
    """mmd with the RBF kernel, exact for N(0, I), of the points mu or of the mixture of the N(mu, exp(logvar))."""
    dtype = compute_dtype(mu, logvar)
    mu = mu.to(dtype).flatten(1)
    logvar = torch.full_like(mu, -math.inf) if logvar is None else to_logvar(logvar.to(dtype), scale).flatten(1)
    variance = logvar.exp().expand_as(mu)
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


class Decomposition(NamedTuple):
    """The result of `fastkl.total_correlation`: three estimates per sample, [N], in nats. Their means decompose the
    average KL(q(z|x) || N(0, I))."""

    mutual_information: Tensor  # ln q(z|x) - ln q(z)
    total_correlation: Tensor  # ln q(z) - sum_d ln q(z_d)
    dimension_wise_kl: Tensor  # sum_d [ln q(z_d) - ln p(z_d)]


def sample_weights(rows: int, batch: int, dataset_size: int, weights: str, *, first: int = 0, **like) -> Tensor:
    """Weights w_ij [rows, batch] of the batch's posteriors in the estimate of q(z_i). Row i's own is first + i.

    "mss", with M = batch - 1: 1 / dataset_size for the row's own posterior, 1 / M - 1 / dataset_size for the next one
    (cyclically), 1 / M for the others, so a row sums to 1. "mws": 1 / (dataset_size batch) for all.
    """
    if weights == "mws":
        return torch.full((rows, batch), 1.0 / (dataset_size * batch), **like)
    others = batch - 1
    matrix = torch.full((rows, batch), 1.0 / others, **like)
    row = torch.arange(rows, device=matrix.device)
    matrix[row, first + row] = 1.0 / dataset_size
    matrix[row, (first + row + 1) % batch] = (dataset_size - others) / (dataset_size * others)
    return matrix


def total_correlation(z, mu, logvar, dataset_size, *, weights="mss", first=0, scale="logvar") -> Decomposition:
    """The decomposition for samples z [n, D] and the posteriors N(mu_j, diag exp(logvar_j)) [B, D] of their batch.

    ln q(z) = ln sum_j w_ij prod_d N(z_id; mu_jd, var_jd) and ln q(z_d) = ln sum_j w_ij N(z_id; mu_jd, var_jd).
    """
    dtype = compute_dtype(z, mu, logvar)
    z, mu, logvar = z.to(dtype), mu.to(dtype), to_logvar(logvar.to(dtype), scale)
    if z.shape[0] == 0:
        return Decomposition(*[(z + mu[:0] + logvar[:0]).sum(1)] * 3)
    like = {"dtype": dtype, "device": z.device}
    log_weights = sample_weights(z.shape[0], mu.shape[0], dataset_size, weights, first=first, **like).log()
    # Clamp the distances: infinity times a share of 0 would be NaN.
    most = 0.25 * torch.finfo(dtype).max
    distance = standardise(z.unsqueeze(1) - mu, logvar)[0].clamp(-most, most)
    terms = -0.5 * (math.log(2 * math.pi) + logvar + distance.square())  # [n, B, D]
    joint = torch.logsumexp(log_weights + terms.sum(-1), 1)
    marginals = torch.logsumexp(log_weights.unsqueeze(-1) + terms, 1).sum(-1)
    own = slice(first, first + z.shape[0])
    conditional = normal_log_prob(z, mu[own], logvar[own], event_ndim=1)
    prior = normal_log_prob(z, torch.zeros_like(z), torch.zeros_like(z), event_ndim=1)
    return Decomposition(conditional - joint, joint - marginals, marginals - prior)
