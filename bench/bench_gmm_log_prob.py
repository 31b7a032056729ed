"""gmm_log_prob: against the formula by broadcasting, the one by matrix products ("expansion"), and
torch.distributions.MixtureSameFamily."""

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


def expansion(z, logits, means, logvars):
    """(z - m)^2 multiplied out, which loses digits for narrow components far from 0."""
    precisions = (-logvars).exp()
    squares = z.square() @ precisions.T - 2 * z @ (means * precisions).T + (means.square() * precisions).sum(-1)
    terms = -0.5 * (math.log(2 * math.pi) * z.shape[-1] + logvars.sum(-1) + squares)
    return torch.logsumexp(logits.log_softmax(-1) + terms, -1)


def same_family(z, logits, means, logvars):
    components = distributions.Independent(normal(means, logvars), 1, validate_args=False)
    weights = distributions.Categorical(logits=logits, validate_args=False)
    return distributions.MixtureSameFamily(weights, components, validate_args=False).log_prob(z)


def inputs(device, n, k, d, per_datum=False):
    """Data and means near one another: the formulas in float32 lose digits otherwise."""
    batch = (n,) if per_datum else ()
    normal = leaves(device, (n, d), (*batch, k), (*batch, k, d), (*batch, k, d))
    return [(spread * x).detach().requires_grad_() for spread, x in zip((0.7, 1.0, 0.7, 0.3), normal)]


# N, K, D
SIZES = ((32, 4, 2), (128, 50, 16), (1024, 100, 16), (256, 500, 32), (4096, 500, 40))


def cases(device, quick):
    ours = fastkl.gmm_log_prob, reference.gmm_log_prob
    functions = formula, *ours, {"torch.distributions": same_family}
    # The eager mixture keeps tensors of N x K x D numbers, 330 MB each at the largest size.
    for size in [(128, 10, 8)] if quick else SIZES:
        name = " x ".join(map(str, size))
        yield Case(name, inputs(device, *size), *functions, every_count=True)
        if not quick:
            yield Case(f"{name}, expansion", inputs(device, *size), expansion, *ours, every_count=True)
    n, k, d = (64, 10, 8) if quick else (512, 50, 64)
    tensors = inputs(device, n, k, d, per_datum=True)
    yield Case(f"{n} x {k} x {d} per datum", tensors, *functions, every_count=True)
