"""total_correlation: with stratified weights, against the formula that holds all pairs in memory."""

import math

import torch
from torch.utils.checkpoint import checkpoint

import fastkl
from bench.case import Case
from fastkl import reference

DATASET_SIZE = 60000
SIZES = ((64, 10), (256, 32), (2048, 32))
ROWS = 256


def formula(z, mu, logvar):
    """The usual formula, with [N, N, D] densities and a weight matrix."""
    n = len(z)
    weights = torch.full((n, n), 1 / (n - 1), device=z.device)
    weights.fill_diagonal_(1 / DATASET_SIZE)
    row = torch.arange(n, device=z.device)
    weights[row, (row + 1) % n] = (DATASET_SIZE - n + 1) / (DATASET_SIZE * (n - 1))
    terms = -0.5 * (math.log(2 * math.pi) + logvar + (z[:, None] - mu).pow(2) / logvar.exp())
    joint = torch.logsumexp(weights.log() + terms.sum(2), 1)
    marginals = torch.logsumexp(weights.log()[:, :, None] + terms, 1).sum(1)
    own = -0.5 * (math.log(2 * math.pi) + logvar + (z - mu).pow(2) / logvar.exp()).sum(1)
    prior = -0.5 * (math.log(2 * math.pi) + z.pow(2)).sum(1)
    return torch.stack([own - joint, joint - marginals, marginals - prior])


def fused(z, mu, logvar):
    return torch.stack(fastkl.total_correlation(z, mu, logvar, DATASET_SIZE))


def definition(z, mu, logvar):
    """By blocks of rows, whose tensors of all pairs are computed again for the gradient."""

    def block(first):
        rows = z[first : first + ROWS]
        return torch.stack(reference.total_correlation(rows, mu, logvar, DATASET_SIZE, first=first))

    return torch.cat([checkpoint(block, first, use_reentrant=False) for first in range(0, len(z), ROWS)], 1)


def cases(device, quick):
    generator = torch.Generator().manual_seed(0)
    # At the largest size the formula keeps some GB.
    for n, d in [(64, 10)] if quick else SIZES:
        mu, logvar, eps = (torch.randn(n, d, generator=generator) for _ in range(3))
        logvar = logvar - 2
        inputs = [(x.to(device)).requires_grad_() for x in (mu + (0.5 * logvar).exp() * eps, mu, logvar)]
        yield Case(f"{n} x {d}", inputs, formula, fused, definition, every_count=True)
