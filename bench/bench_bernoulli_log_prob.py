"""bernoulli_log_prob: the reconstruction term of binary images, and with importance samples."""

from torch import distributions
from torch.nn import functional as F

import fastkl
from bench.case import Case, leaves, uniform
from fastkl import reference


def formula(logits, x):
    return -F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none").sum(-1)


def by_distributions(logits, x):
    # Not validated, because grey values are outside the support.
    return distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)


def fused(logits, x):
    return fastkl.bernoulli_log_prob(x, logits, event_ndim=1)


def definition(logits, x):
    return reference.bernoulli_log_prob(x, logits, event_ndim=1)


def cases(device, quick):
    functions = formula, fused, definition, {"torch.distributions": by_distributions}
    for n, d in [(128, 784)] if quick else [(128, 784), (4096, 784)]:
        inputs = [*leaves(device, (n, d)), uniform(device, n, d)]
        yield Case(f"{n} x {d}", inputs, *functions, budget="bernoulli_log_prob")
    samples, n, d = (8, 64, 784) if quick else (50, 128, 784)
    yield Case(f"{samples} samples x {n} x {d}", [*leaves(device, (samples, n, d)), uniform(device, n, d)], *functions)
