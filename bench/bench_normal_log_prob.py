"""normal_log_prob: a variance for each element, and one learned variance (the sigma-VAE)."""

import math

from torch import distributions

import fastkl
from bench.bench_kl_normal import normal
from bench.case import Case, leaves, uniform
from fastkl import reference


def formula(x, mean, logvar):
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean) ** 2 / logvar.exp()).sum(-1)


def by_distributions(x, mean, logvar):
    return distributions.Independent(normal(mean, logvar), 1, validate_args=False).log_prob(x)


def cases(device, quick):
    functions = formula, fastkl.normal_log_prob, reference.normal_log_prob, {"torch.distributions": by_distributions}
    for n, d in [(128, 784)] if quick else [(128, 784), (4096, 784)]:
        inputs = [uniform(device, n, d), *leaves(device, (n, d), (n, d))]
        yield Case(f"{n} x {d}", inputs, *functions, budget="normal_log_prob")
    yield Case(f"{n} x {d} one variance", [uniform(device, n, d), *leaves(device, (n, d), ())], *functions)
