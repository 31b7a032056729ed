"""rsample_kl: sample and KL in one pass, at the sizes of kl_normal."""

import torch
from torch import distributions

import fastkl
from bench import bench_kl_normal
from bench.case import Case, leaves, normal_noise
from fastkl import reference


def formula(mu, logvar):
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    return z, bench_kl_normal.formula(mu, logvar)


def fused(mu, logvar):
    z, kl = fastkl.rsample_kl(mu, logvar)
    return z, kl.mean()


def definition(mu, logvar, eps):
    z, kl = reference.rsample_kl(mu, logvar, eps=eps)
    return z, kl.mean()


def by_distributions(mu, logvar):
    q = bench_kl_normal.normal(mu, logvar)
    kl = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0, validate_args=False))
    return q.rsample(), kl.sum(1).mean()


def formula_head(head):
    mu, logvar = head.chunk(2, 1)
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    return z, bench_kl_normal.formula(mu.flatten(1), logvar.flatten(1))


def fused_head(head):
    z, kl = fastkl.DiagonalNormal.from_packed(head, dim=1).rsample_kl()
    return z, kl.mean()


def definition_head(head, eps):
    z, kl = reference.rsample_kl(*head.chunk(2, 1), eps=eps, event_ndim=head.dim() - 1)
    return z, kl.mean()


def plain(device, n, d, dtype=torch.float32, headline=False):
    name = f"{n} x {d}" if headline else f"{n} x {d} {str(dtype).removeprefix('torch.')}"
    others = {"torch.distributions": by_distributions} if dtype == torch.float32 else {}
    settings = {"budget": "rsample_kl", "noise": normal_noise, "headline": headline, "by_rows": True}
    return Case(name, leaves(device, (n, d), (n, d), dtype=dtype), formula, fused, definition, others, **settings)


def cases(device, quick):
    for size in bench_kl_normal.SIZES[1:5] if quick else bench_kl_normal.SIZES:
        yield plain(device, *size, headline=True)
    if not quick:
        yield plain(device, 4096, 512, torch.bfloat16)
    shape = (4, 8, 16, 16) if quick else (16, 32, 64, 64)
    name = f"packed head {' x '.join(map(str, shape))}"
    settings = {"budget": "packed, drawn", "noise": normal_noise}
    yield Case(name, leaves(device, shape), formula_head, fused_head, definition_head, **settings)
