"""kl_gmm: by samples and by its upper bound, against the formulas by broadcasting."""

import functools
import math

import torch

import fastkl
from bench.case import Case, leaves
from fastkl import reference

SAMPLES = 8


def by_samples(mu, logvar, logits, means, logvars, eps=None):
    eps = torch.randn(SAMPLES, *mu.shape, device=mu.device) if eps is None else eps
    z = mu + torch.exp(0.5 * logvar) * eps
    entropy = 0.5 * (logvar + math.log(2 * math.pi * math.e)).sum(-1)
    return -entropy - reference.gmm_log_prob(z, logits, means, logvars).mean(0)


def same_noise(seed, mu, *others):
    return by_samples(mu, *others, eps=reference.normal_noise(seed, mu.shape, SAMPLES).to(mu.dtype))


def cases(device, quick):
    seed = torch.tensor(0, device=device)
    drawn = functools.partial(same_noise, seed)
    ours = functools.partial(fastkl.kl_gmm, num_samples=SAMPLES)
    given = {"eager": drawn, "fastkl": functools.partial(ours, seed=seed)}
    upper = [functools.partial(function, method="upper") for function in (reference.kl_gmm, fastkl.kl_gmm)]
    for n, k, d in [(128, 10, 8)] if quick else [(4096, 256, 64) if device == "cuda" else (512, 100, 32)]:
        inputs = leaves(device, (n, d), (n, d), (k,), (k, d), (k, d))
        yield Case(f"{n} x {k} x {d}, {SAMPLES} samples", inputs, by_samples, ours, drawn, same_noise=given)
        yield Case(f"{n} x {k} x {d}, upper bound", inputs, *upper, upper[0])
