"""kl_normal: KL to N(0, I), to a learned prior, and from a packed head."""

import torch

import fastkl

from harness import Case, leaves


def formula(mu, logvar):
    mu, logvar = mu.float(), logvar.float()
    return 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).sum(1)


def formula_prior(mu, logvar, prior_mu, prior_logvar):
    squares = (logvar.exp() + (mu - prior_mu).pow(2)) / prior_logvar.exp()
    return 0.5 * (prior_logvar - logvar + squares - 1).sum(1)


def formula_head(head):
    return formula(*head.flatten(2).chunk(2, 1)).sum(1)


def fastkl_head(head):
    return fastkl.kl_normal(*head.chunk(2, 1), event_ndim=head.dim() - 1)


def cases(device, quick):
    for n, d in [(128, 32), (4096, 512)] if quick else [(128, 32), (4096, 512), (256, 65536)]:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{n} x {d} {str(dtype).removeprefix('torch.')}"
            yield Case(name, leaves(device, (n, d), (n, d), dtype=dtype), formula, fastkl.kl_normal)
    n, d = (128, 32) if quick else (4096, 512)
    yield Case(f"{n} x {d} prior", leaves(device, *[(n, d)] * 4), formula_prior, fastkl.kl_normal)
    yield Case(f"{n} x {d} shared prior", leaves(device, *[(n, d)] * 2, (d,), (d,)), formula_prior, fastkl.kl_normal)
    shape = (4, 8, 16, 16) if quick else (16, 32, 64, 64)
    yield Case(f"head {shape}", leaves(device, shape), formula_head, fastkl_head)
