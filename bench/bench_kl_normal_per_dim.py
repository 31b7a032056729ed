"""kl_normal_per_dim: the batch mean of the KL of every latent dimension, to N(0, I) and to a learned prior."""

from torch import distributions

import fastkl
from bench.bench_kl_normal import normal
from bench.case import Case, leaves
from fastkl import reference


def formula(mu, logvar):
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean(0)


def by_distributions(mu, logvar):
    q, standard = normal(mu, logvar), distributions.Normal(0.0, 1.0, validate_args=False)
    return distributions.kl_divergence(q, standard).mean(0)


def formula_prior(mu, logvar, prior_mu, prior_logvar):
    squares = (logvar.exp() + (mu - prior_mu) ** 2) / prior_logvar.exp()
    return 0.5 * (prior_logvar - logvar + squares - 1).mean(0)


def cases(device, quick):
    functions = fastkl.kl_normal_per_dim, reference.kl_normal_per_dim
    others = {"torch.distributions": by_distributions}
    for n, d in [(128, 32)] if quick else [(4096, 512)]:
        yield Case(
            f"{n} x {d}", leaves(device, (n, d), (n, d)), formula, *functions, others, budget="kl_normal_per_dim"
        )
    inputs = leaves(device, (n, d), (n, d), (d,), (d,))
    yield Case(f"{n} x {d} shared prior", inputs, formula_prior, *functions)
