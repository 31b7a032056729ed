"""kl_normal: KL to N(0, I) from one element to many, from a packed head, in bfloat16, and to a learned prior."""

import torch
from torch import distributions

import fastkl
from bench.case import Case, leaves
from fastkl import reference

SIZES = ((1, 1), (32, 8), (128, 32), (512, 64), (512, 512), (512, 4096), (4096, 8192))


def formula(mu, logvar):
    return 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(1).mean()


def fused(mu, logvar):
    return fastkl.kl_normal(mu, logvar).mean()


def definition(mu, logvar):
    return reference.kl_normal(mu, logvar).mean()


def normal(mu, logvar):
    """A torch.distributions.Normal without argument checks: torch.compile disables them for the whole process."""
    return distributions.Normal(mu, (0.5 * logvar).exp(), validate_args=False)


def by_distributions(mu, logvar):
    standard = distributions.Normal(0.0, 1.0, validate_args=False)
    return distributions.kl_divergence(normal(mu, logvar), standard).sum(1).mean()


def formula_head(head):
    mu, logvar = head.chunk(2, 1)
    return formula(mu.flatten(1), logvar.flatten(1))


def fused_head(head):
    return fastkl.DiagonalNormal.from_packed(head, dim=1).kl().mean()


def formula_prior(mu, logvar, prior_mu, prior_logvar):
    squares = (logvar - prior_logvar).exp() + (mu - prior_mu) ** 2 * (-prior_logvar).exp()
    return 0.5 * (prior_logvar - logvar + squares - 1).sum(1).mean()


def fused_prior(*inputs):
    return fastkl.kl_normal(*inputs).mean()


def definition_prior(*inputs):
    return reference.kl_normal(*inputs).mean()


def prior_by_distributions(mu, logvar, prior_mu, prior_logvar):
    q, p = normal(mu, logvar), normal(prior_mu, prior_logvar)
    return distributions.kl_divergence(q, p).sum(1).mean()


def plain(device, n, d, dtype=torch.float32, headline=False):
    name = f"{n} x {d}" if headline else f"{n} x {d} {str(dtype).removeprefix('torch.')}"
    others = {"torch.distributions": by_distributions} if dtype == torch.float32 else {}
    inputs = leaves(device, (n, d), (n, d), dtype=dtype)
    return Case(name, inputs, formula, fused, definition, others, budget="kl_normal", headline=headline, by_rows=True)


def cases(device, quick):
    for size in SIZES[1:5] if quick else SIZES:
        yield plain(device, *size, headline=True)
    n, d = (128, 32) if quick else (4096, 512)
    shape = (4, 8, 16, 16) if quick else (16, 32, 64, 64)
    name = f"packed head {' x '.join(map(str, shape))}"
    yield Case(name, leaves(device, shape), formula_head, fused_head, lambda h: definition(*halves(h)), budget="packed")
    if not quick:
        yield plain(device, n, d, torch.bfloat16)
    full = {"torch.distributions": prior_by_distributions}
    inputs = leaves(device, *[(n, d)] * 4)
    yield Case(
        f"{n} x {d} prior", inputs, formula_prior, fused_prior, definition_prior, full, budget="kl_normal, prior"
    )
    inputs = leaves(device, *[(n, d)] * 2, (d,), (d,))
    yield Case(f"{n} x {d} shared prior", inputs, formula_prior, fused_prior, definition_prior, full)


def halves(head):
    return [half.flatten(1) for half in head.chunk(2, 1)]
