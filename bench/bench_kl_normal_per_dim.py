"""kl_normal_per_dim: the batch mean of the KL of every latent dimension, to N(0, I) and to a learned prior."""

import torch

import fastkl

from harness import Case, leaves


def formula(mu, logvar):
    mu, logvar = mu.float(), logvar.float()
    return 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).mean(0)


def formula_prior(mu, logvar, prior_mu, prior_logvar):
    squares = (logvar.exp() + (mu - prior_mu).pow(2)) / prior_logvar.exp()
    return 0.5 * (prior_logvar - logvar + squares - 1).mean(0)


def cases(device, quick):
    for n, d in [(128, 32), (4096, 512)] if quick else [(128, 32), (4096, 512), (65536, 64)]:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{n} x {d} {str(dtype).removeprefix('torch.')}"
            yield Case(name, leaves(device, (n, d), (n, d), dtype=dtype), formula, fastkl.kl_normal_per_dim)
    n, d = (128, 32) if quick else (4096, 512)
    inputs = leaves(device, (n, d), (n, d), (d,), (d,))
    yield Case(f"{n} x {d} shared prior", inputs, formula_prior, fastkl.kl_normal_per_dim)
