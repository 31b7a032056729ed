"""gmm_log_prob: against torch.distributions.MixtureSameFamily."""

import torch
from torch import distributions

import fastkl

from harness import Case, leaves


def same_family(z, logits, means, logvars):
    components = distributions.Independent(distributions.Normal(means, torch.exp(0.5 * logvars)), 1)
    weights = distributions.Categorical(logits=logits)
    return distributions.MixtureSameFamily(weights, components, validate_args=False).log_prob(z)


def inputs(device, n, k, d):
    z, logits, means, logvars = leaves(device, (n, d), (k,), (k, d), (k, d))
    return [z, logits, means, (0.3 * logvars).detach().requires_grad_()]


def cases(device, quick):
    # The eager mixture takes 1.9 GB at the first of the large sizes, 12 GB at the second.
    sizes = [(128, 10, 8), (512, 50, 16)] if quick else [(128, 10, 8), (4096, 500, 40), (2048, 1000, 256)]
    for size in sizes:
        yield Case(" x ".join(map(str, size)), inputs(device, *size), same_family, fastkl.gmm_log_prob)
    n, k, d = (64, 10, 8) if quick else (512, 50, 64)
    per_datum = leaves(device, (n, d), (n, k), (n, k, d), (n, k, d))
    yield Case(f"{n} x {k} x {d} per datum", per_datum, same_family, fastkl.gmm_log_prob)
