"""Calls of the priors' methods: their parameters are the tensors, and gradients to them are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fuzz_posteriors import Posterior, posterior_of

import fastkl
from fastkl import priors

import fuzz_oracle as oracle
from fuzz_check import Case, compute_dtype
from fuzz_inputs import Draw
from fuzz_mixtures import spread_rows
from helpers import DEVICE

KINDS = ("standard", "normal", "diag", "spherical", "tied", "full", "vamp")


@dataclass
class Prior:
    kind: str
    tensors: dict[str, torch.Tensor]
    make: Callable  # the module, whose parameters are the tensors by name of which it takes its own
    mixture: Callable  # (logits, means, logvars, scale_tril) in plain torch, likewise

    @property
    def is_mixture(self) -> bool:
        return self.kind not in ("standard", "normal")


def prior_of(d: Draw, size: int, kinds=KINDS) -> Prior:
    kind, k, dtype = d.pick(kinds), min(9, d.size(9)), d.pick(d.dtypes) if d.mixed else d.dtype

    def tensor(values):
        return d.tensor(values, dtype, expand=False)

    if kind == "standard":
        tensors = {}
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
        if kind in ("standard", "normal"):
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
    zero = torch.zeros(z.shape[-1], dtype=z.dtype)
    return oracle.normal_terms(z, t.get("prior_mu", zero), t.get("prior_logvar", zero)).sum(-1)


def rows_of(d: Draw, size: int, dtype=None) -> Posterior:
    """A posterior as mixtures' tests have them: not much wider, or narrower, than components are."""
    batch = d.pick(((d.size(9),), (d.size(9),), (2, 3)))
    narrow = lambda shape: d.logvar(shape, -6.0, 4.0)  # noqa: E731
    return posterior_of(d, (*batch, size), 1, lambda shape: spread_rows(d, shape), narrow, bounds=False, dtype=dtype)


def prior_log_prob(d: Draw) -> Case:
    d.computed_alike()
    size = min(12, d.size(12))
    prior = prior_of(d, size)
    tensors = {"z": d.tensor(spread_rows(d, (*d.batch(17), size))), **prior.tensors}
    call = lambda z, **t: prior.make(**t).log_prob(z)  # noqa: E731
    return Case(call, tensors, lambda z, **t: log_prob_of(prior, z, t), settings={"prior": prior.kind})


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


def prior_kl(d: Draw) -> Case:
    d.computed_alike()
    size = min(12, d.size(12))
    prior, q = prior_of(d, size), rows_of(d, size)
    tensors, seed, count = {**q.tensors, **prior.tensors}, d.seed(), d.pick((1, 2))
    methods = ("mc", "mc", "upper", "lower", "bounds", *(("relaxed",) if prior.kind != "full" else ()))
    method = d.pick(methods) if prior.is_mixture else "closed"
    settings = {"prior": prior.kind, "method": method, **q.settings}
    how = {"entropy": d.pick(("closed", "sampled")), "gradient": d.pick(("plain", "stl"))}
    own = compute_dtype(q.tensors)
    if method == "relaxed":
        tensors["z"] = d.tensor(spread_rows(d, (count, *q.shape)))
        gumbel = -torch.log(-torch.log(d.uniform((count, *q.shape[:-1], tensors["prior_logits"].shape[0]), 1e-6)))
        tensors["gumbel"] = gumbel.to(own).to(DEVICE)
        how = {"tau": d.pick((0.5, 1.0, 2.0))}
    noisy = method == "mc"
    settings |= how | ({"num_samples": count, "seed": seed} if noisy else {})
    zero = torch.zeros(q.shape, dtype=own, device=DEVICE)

    def call(**t):
        p, posterior = prior.make(**t), q.make(**t)
        if method == "bounds":
            return p.kl_bounds(posterior)
        if method == "relaxed":
            return p.kl_relaxed(posterior, t["z"], how["tau"], gumbel=t["gumbel"])
        if not prior.is_mixture:
            return p.kl(posterior)
        return p.kl(posterior, method=method, **(how | {"num_samples": count, "seed": seed} if noisy else {}))

    def truth(noise=None, z=None, gumbel=None, **t):
        mu, logvar = q.parts(**t)
        if not prior.is_mixture:
            return oracle.kl_elements(mu, logvar, t.get("prior_mu"), t.get("prior_logvar")).sum(-1)
        mixture = prior.mixture(**t)
        if method == "relaxed":
            return kl_components(mu, logvar, z, gumbel, how["tau"], *mixture[:3])
        if noisy:
            eps = {"eps": noise, "entropy_form": how["entropy"], "gradient": how["gradient"]}
            return oracle.kl_gmm(mu, logvar, *mixture, **eps)
        found = [oracle.kl_gmm(mu, logvar, *mixture, method=m) for m in ("lower", "upper")]
        return found if method == "bounds" else found[method == "upper"]

    def noise():
        return fastkl.rsample_normal(zero, zero, num_samples=count, seed=seed).double(), 1e-6

    return Case(call, tensors, truth, noise if noisy else None, settings)


def prior_rsample(d: Draw) -> Case:
    size, shape, seed = min(12, d.size(12)), d.pick(((5,), (2, 3), (1,))), d.seed()
    prior, tau = prior_of(d, size), d.pick((0.5, 1.0, 2.0))
    count, dtype = (
        torch.Size(shape).numel(),
        compute_dtype({n: t for n, t in prior.tensors.items() if "logits" not in n}),
    )
    k = prior.tensors["prior_logits"].shape[0] if prior.is_mixture else 0
    how = {"num_samples": count, "seed": seed}

    def noise():
        zeros = torch.zeros(size, dtype=dtype, device=DEVICE)
        if not prior.is_mixture:
            plain = priors.LearnedNormal(size)
            del plain.mu, plain.logvar
            plain.mu = plain.logvar = zeros
            return plain.rsample(shape, seed=seed).double().detach(), 4e-6
        narrow = torch.full((k, 1), -2000.0, dtype=dtype, device=DEVICE)
        even = torch.zeros(k, dtype=dtype, device=DEVICE)
        chosen = fastkl.rsample_gmm(even, torch.eye(k, dtype=dtype, device=DEVICE), narrow, **how).double().log()
        eps = fastkl.rsample_gmm(even, zeros.expand(k, size), **how).double()
        return torch.cat([chosen, eps], -1), 4e-6

    def truth(noise, **t):
        if not prior.is_mixture:
            zero = torch.zeros(size, dtype=noise.dtype)
            return t.get("prior_mu", zero) + torch.exp(0.5 * t.get("prior_logvar", zero)) * noise
        logits, means, logvars, scale_tril = prior.mixture(**t)
        gumbel, eps = noise[..., :k], noise[..., k:]
        perturbed = logits.masked_fill(logits.isinf(), -1e30) + gumbel
        soft = oracle.relaxed(perturbed, tau)
        y = torch.zeros_like(soft).scatter(-1, perturbed.argmax(-1, keepdim=True), 1.0) + (soft - soft.detach())
        z = y @ means
        if scale_tril is not None:
            return (z + torch.einsum("nk,kij,nj->ni", y, scale_tril, eps)).view(*shape, size)
        return (z + (y @ torch.exp(0.5 * logvars).expand(means.shape)) * eps).view(*shape, size)

    draw = lambda **t: prior.make(**t).rsample(shape, seed=seed, **({"tau": tau} if k else {}))  # noqa: E731
    return Case(draw, prior.tensors, truth, noise, {"prior": prior.kind, "tau": tau, "shape": shape}, dtype)
