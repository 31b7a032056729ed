"""rsample_kl: the sample and its KL, both from one pass."""

import functools

import torch

import fastkl
from fastkl import reference

from harness import Case, leaves


def formula(mu, logvar):
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    mu, logvar = mu.float(), logvar.float()
    return z, 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).sum(1)


def formula_prior(mu, logvar, prior_mu, prior_logvar):
    z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
    squares = (logvar.exp() + (mu - prior_mu).pow(2)) / prior_logvar.exp()
    return z, 0.5 * (prior_logvar - logvar + squares - 1).sum(1)


def cases(device, quick):
    seed = torch.tensor(0, device=device)
    same_noise = tuple(functools.partial(f, seed=seed) for f in (reference.rsample_kl, fastkl.rsample_kl))
    for n, d in [(128, 32), (4096, 512)] if quick else [(128, 32), (4096, 512), (256, 65536)]:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = leaves(device, (n, d), (n, d), dtype=dtype)
            name = f"{n} x {d} {str(dtype).removeprefix('torch.')}"
            yield Case(name, inputs, formula, fastkl.rsample_kl, same_noise)
    n, d = (128, 32) if quick else (4096, 512)
    inputs = leaves(device, (n, d), (n, d), (d,), (d,))
    yield Case(f"{n} x {d} shared prior", inputs, formula_prior, fastkl.rsample_kl, same_noise)
