"""gmm_log_prob: against the formula by broadcasting and torch.distributions.MixtureSameFamily."""

import math

import torch
from torch import distributions

import fastkl
from bench.bench_kl_normal import normal
from bench.case import Case, leaves
from fastkl import reference


def formula(z, logits, means, logvars):
    squares = (z.unsqueeze(-2) - means) ** 2 * (-logvars).exp()
    terms = -0.5 * (math.log(2 * math.pi) + logvars + squares).sum(-1)
    return torch.logsumexp(logits.log_softmax(-1) + terms, -1)


def same_family(z, logits, means, logvars):
    components = distributions.Independent(normal(means, logvars), 1, validate_args=False)
    weights = distributions.Categorical(logits=logits, validate_args=False)
    return distributions.MixtureSameFamily(weights, components, validate_args=False).log_prob(z)


def inputs(device, n, k, d):
    z, logits, means, logvars = leaves(device, (n, d), (k,), (k, d), (k, d))
    return [z, logits, means, (0.3 * logvars).detach().requires_grad_()]


def cases(device, quick):
    functions = formula, fastkl.gmm_log_prob, reference.gmm_log_prob, {"torch.distributions": same_family}
    # The eager mixture saves a tensor of N x K x D numbers, 67 MB at the larger size. With many more dimensions its
    # float32 result would not match the definition.
    for size in [(128, 10, 8)] if quick else [(128, 10, 8), (4096, 256, 16)]:
        yield Case(" x ".join(map(str, size)), inputs(device, *size), *functions)
    n, k, d = (64, 10, 8) if quick else (512, 50, 32)
    yield Case(f"{n} x {k} x {d} per datum", leaves(device, (n, d), (n, k), (n, k, d), (n, k, d)), *functions)
