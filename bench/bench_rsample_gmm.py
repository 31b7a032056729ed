"""rsample_gmm: a relaxed sample of a Gaussian mixture, against K samples for each datum, weighted."""

import functools

import torch
from torch.nn import functional as F

from bench.case import Case, leaves
from fastkl import reference
from fastkl.ops.mixture.rsample_gmm import rsample_gmm
from fastkl.reference import Stream

TAU = 0.7


def formula(logits, means, logvars, gumbel=None, eps=None):
    """The naive formula: a sample of each component for each datum."""
    y = F.gumbel_softmax(logits, TAU) if gumbel is None else torch.softmax((logits + gumbel) / TAU, -1)
    eps = torch.randn(*logits.shape, means.shape[-1], device=means.device) if eps is None else eps
    return (y.unsqueeze(-1) * (means + (0.5 * logvars).exp() * eps)).sum(-2)


def noise(logits, means, seed):
    gumbel = reference.gumbel_noise(seed, logits.shape, Stream.RELAXED_CHOICE)
    return gumbel, reference.normal_noise(seed, (*logits.shape[:-1], means.shape[-1]), stream=Stream.RELAXED_NOISE)


def definition(logits, means, logvars, seed):
    gumbel, eps = (drawn.to(logits) for drawn in noise(logits, means, seed))
    y = reference.relaxed_one_hot(logits + gumbel, TAU)
    return y @ means + (y @ (0.5 * logvars).exp()) * eps


def one_noise(logits, means, logvars, seed):
    """The formula with the definition's noise, shared by all components of a datum."""
    gumbel, eps = noise(logits, means, seed)
    return formula(logits, means, logvars, gumbel, eps.unsqueeze(-2))


def cases(device, quick):
    seed = torch.tensor(0, device=device)
    ours = functools.partial(rsample_gmm, tau=TAU)
    given = {"eager": functools.partial(one_noise, seed=seed), "fastkl": functools.partial(ours, seed=seed)}
    truth = functools.partial(definition, seed=seed)
    for n, k, d in [(128, 10, 16)] if quick else [(65536, 128, 64) if device == "cuda" else (4096, 100, 40)]:
        inputs = leaves(device, (n, k), (k, d), (k, d))
        yield Case(f"{n} x {k} x {d}", inputs, formula, ours, truth, same_noise=given)
