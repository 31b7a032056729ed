"""Calls of monitors, of data in two parts, and of remedies."""

from __future__ import annotations

import math

import torch
from fuzz_posteriors import posterior_of
from fuzz_priors import rows_of

import fastkl
from fastkl import monitors, remedies

import fuzz_oracle as oracle
from fuzz_check import Case, compute_dtype
from fuzz_inputs import Draw
from fuzz_mixtures import mixture, mixture_of, spread_rows
from helpers import DEVICE


def _in_parts(monitor, updates, together: bool):
    """Of one monitor that sees all, or of one for each part."""
    first, *others = [monitor() for _ in updates]
    for each, update in zip([first, *others], updates):
        update(first if together else each)
    for other in others if not together else ():
        first.merge(other)
    return first


def _halves(q, rows):
    """Two parts of a batch of posteriors; the second may be of the event alone."""
    mu, logvar = q.mean, q.exact_logvar
    settings = {"event_ndim": q.event_ndim}
    return [fastkl.DiagonalNormal(mu[part], logvar[part], **settings) for part in (slice(0, rows), slice(rows, None))]


def monitor(d: Draw) -> Case:
    kind, together = d.pick(("active", "kl", "information", "usage", "size")), d.chance(0.5)
    shown = {"monitor": kind, "together": together}
    if kind == "size":
        shape, dim = (d.size(12), d.size(9)), d.pick((0, -1))
        tensors = {name: d.tensor(d.location(shape), expand=False) for name in ("one", "other")}

        def call(**t):
            updates = [lambda m, w=w: m.update(w, dim) for w in t.values()]
            found = _in_parts(monitors.EffectiveSampleSize, updates, together)
            return found.compute(), found.fraction()

        def truth(**t):
            size = torch.cat([oracle.effective_sample_size(w, dim) for w in t.values()]).mean().detach()
            return size, size / shape[dim]

        return Case(call, tensors, truth, settings=shown, together=True)
    if kind == "usage":
        n, size = max(2, d.size(17)), min(12, d.size(12))
        tensors = {"z": d.tensor(spread_rows(d, (n, size))), **mixture(d, (n,), size, own=False)}

        def call(z, **t):
            update = [lambda m: m.update(fastkl.gmm_responsibilities(z[:1], **t))]
            update += [lambda m: m.update(fastkl.gmm_moments(z[1:], **t))]
            found = _in_parts(monitors.ComponentUsage, update, together).compute()
            return found.shares, found.entropy

        def truth(z, **t):
            shares = oracle.joint(z, *mixture_of(t)).softmax(-1).mean(0).detach()
            return shares, -(shares * shares.masked_fill(shares == 0, 1.0).log()).sum()

        return Case(call, tensors, truth, settings=shown, together=True)
    q = rows_of(d, min(12, d.size(12)))
    rows, seed = q.shape[0] // 2, d.seed()
    shown |= q.settings

    def call(**t):
        parts = [part for part in _halves(q.make(**t), rows) if part.shape[0]]
        how = {"seed": seed, "aggregate": q.make(**t)} if kind == "information" else {}
        updates = [lambda m, part=part: m.update(part, **how) for part in parts]
        names = {"active": "ActiveUnits", "kl": "KLPerDimension", "information": "MutualInformation"}
        return _in_parts(getattr(monitors, names[kind]), updates, together).compute()

    def truth(noise=None, **t):
        mu, logvar = (part.detach() for part in q.parts(**t))
        if kind == "active":
            means = mu.flatten(0, -2)
            return (means - means.mean(0)).square().sum(0) / (len(means) - 1)
        if kind == "kl":
            return oracle.kl_elements(mu, logvar).flatten(0, -2).mean(0)
        mu, logvar = mu.flatten(0, -2), logvar.flatten(0, -2)
        z = mu + torch.exp(0.5 * logvar) * noise
        every = oracle.normal_terms(z.unsqueeze(1), mu, logvar).sum(-1).logsumexp(1) - math.log(len(mu))
        return (oracle.normal_terms(z, mu, logvar).sum(-1) - every).mean()

    def noise():
        flat = (math.prod(q.shape[:-1]), q.shape[-1])
        positions = flat[0] // q.shape[0]
        zero = torch.zeros(flat, dtype=compute_dtype(q.tensors), device=DEVICE)
        parts = [part for part in (zero[: rows * positions], zero[rows * positions :]) if len(part)]
        return torch.cat([fastkl.rsample_normal(part, part, seed=seed).double() for part in parts]), 1e-6

    return Case(call, q.tensors, truth, noise if kind == "information" else None, shown, together=True)


def remedy(d: Draw) -> Case:
    kind = d.pick(("balance", "capacity", "of a KL", "free bits", "free bits"))
    per, level = d.pick(("sample", "dimension", "batch")), d.pick((0.0, 0.3, 2.0))
    shown = {"remedy": kind, "per": per, "level": level}
    if kind == "free bits":
        shape, joint = d.pick((((5, 2, 3), 0), ((3, 4, 3), 1), ((d.size(9), d.size(33)), 0)))
        joint = 0 if per == "sample" else joint
        narrow = lambda s: d.logvar(s, -20.0, 20.0)  # noqa: E731
        q = posterior_of(d, shape, len(shape) - 1, None, narrow)
        call = lambda **t: remedies.free_bits(q.make(**t), level, per=per, joint_ndim=joint)  # noqa: E731

        def truth(**t):
            kl = oracle.kl_elements(*q.parts(**t))
            kl = kl.mean(0, keepdim=True) if per == "batch" else kl
            parts = kl.flatten(1).sum(1, keepdim=True) if per == "sample" else kl.sum(-1) if joint else kl.flatten(1)
            found = parts.clamp(min=level).sum(-1)
            return found.squeeze(0) if per == "batch" else found

        return Case(call, q.tensors, truth, settings=shown | q.settings, together=True)
    groups = d.size(7)
    tensors = {"kl": d.tensor(d.location((d.size(9), groups)).abs())}
    if kind == "balance":
        sizes = [d.random.randint(1, 9) for _ in range(groups)]

        def balanced(kl):
            weights = (kl.detach().mean(0) + 0.01) / torch.tensor(sizes, dtype=kl.dtype)
            weights = weights / weights.mean()
            return (kl * weights).sum(-1), weights

        def call(kl):
            return remedies.balance(kl, sizes, beta=0.5), remedies.balance_weights(kl, sizes)

        return Case(call, tensors, balanced, settings=shown | {"sizes": sizes})
    if kind == "capacity":
        per = "batch" if per == "dimension" else per
        truth = lambda kl: ((kl.mean() if per == "batch" else kl) - level).abs()  # noqa: E731
        return Case(lambda kl: remedies.capacity(kl, level, per=per), tensors, truth, settings=shown)

    def least(kl):
        kl = kl.mean(0) if per == "batch" else kl
        return kl.clamp(min=level) if per == "sample" else kl.clamp(min=level).sum(-1)

    return Case(lambda kl: remedies.free_bits(kl, level, per=per), tensors, least, settings=shown)
