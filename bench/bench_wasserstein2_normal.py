"""wasserstein2_normal: the squared distance per sample, to N(0, I) and to a learned prior."""

import fastkl
from bench.case import Case, leaves
from fastkl import reference


def formula(mu, logvar):
    return (mu**2 + ((0.5 * logvar).exp() - 1) ** 2).sum(-1)


def formula_prior(mu, logvar, prior_mu, prior_logvar):
    return ((mu - prior_mu) ** 2 + ((0.5 * logvar).exp() - (0.5 * prior_logvar).exp()) ** 2).sum(-1)


def cases(device, quick):
    functions = fastkl.wasserstein2_normal, reference.wasserstein2_normal
    for n, d in [(128, 32)] if quick else [(4096, 512)]:
        yield Case(f"{n} x {d}", leaves(device, (n, d), (n, d)), formula, *functions, budget="wasserstein2_normal")
    inputs = leaves(device, (n, d), (n, d), (d,), (d,))
    yield Case(f"{n} x {d} shared prior", inputs, formula_prior, *functions)
