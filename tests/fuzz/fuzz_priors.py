"""Calls of the priors' methods, with gradients in the priors' parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fuzz_posteriors import Posterior, posterior_of

from fastkl import priors

import fuzz_oracle as oracle
from fuzz_inputs import WIDE, Draw
from fuzz_mixtures import spread_rows
from helpers import DEVICE

GAUSSIANS = ("standard", "normal")
KINDS = (*GAUSSIANS, "diag", "spherical", "tied", "full", "vamp", "flow")


@dataclass
class Prior:
    kind: str
    tensors: dict[str, torch.Tensor]
    make: Callable  # the module, whose parameters are the tensors by name of which it takes its own
    mixture: Callable  # (logits, means, logvars, scale_tril) in plain torch, likewise

    @property
    def is_mixture(self) -> bool:
        return self.kind not in (*GAUSSIANS, "flow")


class Flow(torch.nn.Module):
    """x = sinh(loc + exp(log_scale) u), u ~ N(0, I), as zuko's flows are: called, it is its own distribution."""

    def __init__(self, loc, log_scale):
        super().__init__()
        self._parameters |= {"loc": loc, "log_scale": log_scale}
        self.event_shape = loc.shape

    def forward(self):
        return self

    def log_prob(self, x):
        u = (x.asinh() - self.loc) * torch.exp(-self.log_scale)
        return (oracle.normal_terms(u, 0.0, torch.zeros_like(u)) - self.log_scale - 0.5 * x.square().log1p()).sum(-1)

    def rsample(self, shape):
        u = torch.randn((*shape, *self.loc.shape), dtype=self.loc.dtype, device=self.loc.device)
        return torch.sinh(self.loc + torch.exp(self.log_scale) * u)


def prior_of(d: Draw, size: int, kinds=KINDS) -> Prior:
    kind, k, dtype = d.pick(kinds), min(9, d.size(9)), d.pick(d.dtypes) if d.mixed else d.dtype

    def tensor(values):
        return d.tensor(values, dtype, expand=False)

    if kind == "standard":
        tensors = {}
    elif kind == "flow":  # computed in its own dtype
        dtype = dtype if dtype in WIDE else torch.float32
        tensors = {"prior_loc": tensor(d.normal((size,))), "prior_log_scale": tensor(0.3 * d.normal((size,)))}
    elif kind == "normal":
        tensors = {"prior_mu": tensor(spread_rows(d, (size,))), "prior_logvar": tensor(d.logvar((size,), -6.0, 6.0))}
    else:
        logits = d.normal((k,)) * d.pick((0.0, 1.0, 5.0))
        if k > 1 and d.chance(0.15):
            logits[d.random.randrange(k)] = float("-inf")
        means = spread_rows(d, (k, size))
        tensors = {"prior_logits": tensor(logits)}
        if kind == "vamp":
            tensors["prior_pseudo_inputs"] = tensor(torch.cat([means, d.logvar((k, size), -6.0, 6.0)], 1))
        else:
            tensors["prior_means"] = tensor(means)
        if kind == "full":
            tensors["prior_log_diagonal"] = tensor(0.5 * d.normal((k, size)))
            tensors["prior_lower"] = tensor(0.3 * d.normal((k, size * (size - 1) // 2)) / size**0.5)
        elif kind != "vamp":
            shape = {"diag": (k, size), "spherical": (k, 1), "tied": (1, size)}[kind]
            tensors["prior_logvars"] = tensor(d.logvar(shape, -6.0, 6.0))

    def make(**t):
        if kind == "flow":
            return priors.FlowPrior(Flow(t["prior_loc"], t["prior_log_scale"]))
        if kind in GAUSSIANS:
            prior = (priors.StandardNormal if kind == "standard" else priors.LearnedNormal)(size)
        elif kind == "vamp":
            prior = priors.VampPrior(torch.zeros(k, 2 * size), lambda u: u)
        else:
            prior = priors.GaussianMixture(k, size, kind)
        prior.to(DEVICE)
        for name in list(prior._parameters):
            delattr(prior, name)
            setattr(prior, name, t[f"prior_{name}"])
        return prior

    def mixture(prior_logits=None, prior_means=None, prior_logvars=None, **t):
        if kind == "vamp":
            return (prior_logits, *t["prior_pseudo_inputs"].chunk(2, 1), None)
        if kind != "full":
            return prior_logits, prior_means, prior_logvars, None
        scale_tril = torch.diag_embed(t["prior_log_diagonal"].exp())
        rows, columns = torch.tril_indices(size, size, -1)
        below = torch.zeros_like(scale_tril).index_put((torch.arange(k)[:, None], rows, columns), t["prior_lower"])
        return prior_logits, prior_means, None, scale_tril + below

    return Prior(kind, tensors, make, mixture)


def log_prob_of(prior: Prior, z, t):
    """ln p(z) in plain torch."""
    if prior.is_mixture:
        return oracle.joint(z, *prior.mixture(**t)).logsumexp(-1)
    if prior.kind == "flow":
        u = (z.asinh() - t["prior_loc"]) / torch.exp(t["prior_log_scale"])
        return (-0.5 * (oracle.LOG_2PI + u.square() + (1 + z.square()).log()) - t["prior_log_scale"]).sum(-1)
    zero = torch.zeros(z.shape[-1], dtype=z.dtype)
    return oracle.normal_terms(z, t.get("prior_mu", zero), t.get("prior_logvar", zero)).sum(-1)


def rows_of(d: Draw, size: int, dtype=None) -> Posterior:
    """A posterior as mixtures' tests have them: not much wider, or narrower, than components are."""
    batch = d.pick(((d.size(9),), (d.size(9),), (2, 3)))
    narrow = lambda shape: d.logvar(shape, -6.0, 4.0)  # noqa: E731
    return posterior_of(d, (*batch, size), 1, lambda shape: spread_rows(d, shape), narrow, bounds=False, dtype=dtype)


def kl_components(d_mu, d_logvar, z, gumbel, tau, logits, means, logvars):
    """The relaxed KL: to one component, softly chosen, and that of the choice."""
    log_pi = logits - logits.logsumexp(-1, keepdim=True)
    found = oracle.joint(z, logits, means, logvars)
    log_r = found - found.logsumexp(-1, keepdim=True)
    out = log_r == float("-inf")
    y = oracle.relaxed(log_r.masked_fill(out, -1e30) + gumbel, tau).masked_fill(out, 0.0)
    mean, sigma = y @ means, y @ torch.exp(0.5 * logvars).expand(means.shape)
    surprise = (log_r - log_pi).masked_fill(out, 0.0)
    kl = oracle.kl_elements(d_mu, d_logvar, mean, 2 * sigma.log()).sum(-1)
    return (kl + (log_r.exp() * surprise).sum(-1)).mean(0)
