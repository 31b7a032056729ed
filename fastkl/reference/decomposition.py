"""The KL's decomposition into mutual information, total correlation and dimension-wise KL, estimated from a batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.reference._parameters import compute_dtype, standardise
from fastkl.reference.likelihoods import normal_log_prob


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


def total_correlation(z, mu, logvar, dataset_size, *, weights="mss", first=0) -> Decomposition:
    """The decomposition for samples z [n, D] and the posteriors N(mu_j, diag exp(logvar_j)) [B, D] of their batch.

    ln q(z) = ln sum_j w_ij prod_d N(z_id; mu_jd, var_jd) and ln q(z_d) = ln sum_j w_ij N(z_id; mu_jd, var_jd).
    """
    dtype = compute_dtype(z, mu, logvar)
    z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
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
