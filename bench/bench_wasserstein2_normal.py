"""wasserstein2_normal: the squared distance per sample, to N(0, I) and to a learned prior."""

import torch

import fastkl

from harness import Case, leaves


def formula(mu, logvar):
    mu, logvar = mu.float(), logvar.float()
    return (mu.pow(2) + ((0.5 * logvar).exp() - 1).pow(2)).sum(-1)


def formula_prior(mu, logvar, prior_mu, prior_logvar):
    return ((mu - prior_mu).pow(2) + ((0.5 * logvar).exp() - (0.5 * prior_logvar).exp()).pow(2)).sum(-1)


def cases(device, quick):
    for n, d in [(128, 32), (4096, 512)] if quick else [(128, 32), (4096, 512), (65536, 64)]:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{n} x {d} {str(dtype).removeprefix('torch.')}"
            yield Case(name, leaves(device, (n, d), (n, d), dtype=dtype), formula, fastkl.wasserstein2_normal)
    n, d = (128, 32) if quick else (4096, 512)
    inputs = leaves(device, (n, d), (n, d), (d,), (d,))
    yield Case(f"{n} x {d} shared prior", inputs, formula_prior, fastkl.wasserstein2_normal)
