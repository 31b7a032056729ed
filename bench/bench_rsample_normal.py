"""rsample_normal: the reparameterised sample mu + sigma eps."""

import torch

import fastkl
from bench.bench_kl_normal import normal
from bench.case import Case, leaves, normal_noise
from fastkl import reference


def formula(mu, logvar):
    return mu + torch.randn_like(mu) * (0.5 * logvar).exp()


def by_distributions(mu, logvar):
    return normal(mu, logvar).rsample()


def cases(device, quick):
    others = {"torch.distributions": by_distributions}
    for n, d in [(128, 32)] if quick else [(128, 32), (4096, 512)]:
        inputs = leaves(device, (n, d), (n, d))
        functions = formula, fastkl.rsample_normal, reference.rsample_normal, others
        yield Case(f"{n} x {d}", inputs, *functions, budget="rsample_normal", noise=normal_noise)
