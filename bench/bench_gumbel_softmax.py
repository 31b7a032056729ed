"""gumbel_softmax: a relaxed one-hot sample of a categorical variable."""

import torch
from torch import distributions
from torch.nn import functional as F

import fastkl
from bench.case import Case, leaves
from fastkl import reference

TAU = 0.7


def formula(logits):
    return F.gumbel_softmax(logits, TAU)


def by_distributions(logits):
    tau = torch.tensor(TAU, device=logits.device)
    return distributions.RelaxedOneHotCategorical(tau, logits=logits, validate_args=False).rsample()


def fused(logits, seed=None):
    return fastkl.gumbel_softmax(logits, TAU, seed=seed)


def definition(logits, gumbel):
    return reference.relaxed_one_hot(logits + gumbel, TAU)


def noise(inputs, outputs):
    """The noise added to the logits, up to a constant per row, which the softmax cancels."""
    y = outputs[0].detach()
    if not ((y.sum(-1) - 1).abs().max() < 1e-2 and y.argmax(-1).unique().numel() > 1):
        raise ValueError("rows do not sum to 1, or all choose the same class")
    return {"gumbel": TAU * y.log() - inputs[0].detach()}


def cases(device, quick):
    others = {"torch.distributions": by_distributions}
    for n, k in [(128, 32)] if quick else [(128, 32), (4096, 512)]:
        inputs = leaves(device, (n, k))
        yield Case(f"{n} x {k}", inputs, formula, fused, definition, others, budget="gumbel_softmax", noise=noise)
