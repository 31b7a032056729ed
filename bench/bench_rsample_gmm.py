"""rsample_gmm: a relaxed sample of a Gaussian mixture, against K samples for each datum, weighted."""

import functools

import torch
import torch.nn.functional as F

from fastkl import reference
from fastkl.mixtures import SECOND_KEY, rsample_gmm

from harness import Case, leaves


def formula(logits, means, logvars):
    """One sample of each component for each datum: what comes to mind first."""
    y = F.gumbel_softmax(logits, 0.7).unsqueeze(-1)
    components = means + (0.5 * logvars).exp() * torch.randn(*logits.shape, means.shape[-1], device=means.device)
    return (y * components).sum(-2)


def definition(logits, means, logvars, seed):
    y = reference.gumbel_softmax(logits, 0.7, seed=seed)
    eps = reference.normal_noise(seed ^ SECOND_KEY, (*logits.shape[:-1], means.shape[-1]))
    return y @ means + (y @ (0.5 * logvars).exp()) * eps


def cases(device, quick):
    seed = torch.tensor(0, device=device)
    ours = functools.partial(rsample_gmm, tau=0.7)
    same_noise = functools.partial(definition, seed=seed), functools.partial(ours, seed=seed)
    for n, k, d in [(128, 10, 16)] if quick else [(128, 10, 16), (4096, 100, 40)]:
        yield Case(f"{n} x {k} x {d}", leaves(device, (n, k), (k, d), (k, d)), formula, ours, same_noise)
