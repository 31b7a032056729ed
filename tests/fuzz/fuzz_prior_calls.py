"""Calls of the priors' log_prob, kl and rsample: of a whole latent, or of the channels at each of its positions."""

from __future__ import annotations

import math

import torch
from fuzz_posteriors import Posterior, posterior_of
from fuzz_priors import KINDS, kl_components, log_prob_of, prior_of, rows_of

import fastkl
from fastkl import priors
from fastkl.ops.categorical.gumbel_softmax import draw_choice
from fastkl.reference import Stream

import fuzz_oracle as oracle
from fuzz_check import Case, compute_dtype
from fuzz_inputs import Draw
from fuzz_mixtures import spread_rows
from helpers import DEVICE

POSITIONS = (2, 3)


class _Latent:
    """Of one vector, or of `size` channels at each position, channels first; and the prior for it."""

    def __init__(self, d: Draw, positions: tuple[int, ...], kinds):
        d.computed_alike()
        self.positions, self.size = positions, min(12, d.size(12)) if not positions else d.pick((1, 3, 4))
        self.prior = prior_of(d, self.size, kinds)
        self.event = math.prod(positions) * self.size

    def make(self, **t):
        prior = self.prior.make(**t)
        return priors.PerPosition(prior, self.positions) if self.positions else prior

    def rows(self, t):
        """[..., event] -> [..., positions, channels]."""
        return t.unflatten(-1, (self.size, -1)).mT if self.positions else t

    def flat(self, t):
        return t.mT.flatten(-2) if self.positions else t

    def total(self, t):
        return t.sum(-1) if self.positions else t

    def posterior(self, d: Draw) -> Posterior:
        if not self.positions:
            return rows_of(d, self.size)
        narrow = lambda shape: d.logvar(shape, -6.0, 4.0)  # noqa: E731
        shape = (d.pick((1, 3)), self.size, *self.positions)
        return posterior_of(d, shape, len(shape) - 1, lambda shape: spread_rows(d, shape), narrow, bounds=False)


def prior_log_prob(d: Draw, positions=(), kinds=KINDS) -> Case:
    latent = _Latent(d, positions, kinds)
    tensors = {"z": d.tensor(spread_rows(d, (*d.batch(17), latent.event))), **latent.prior.tensors}
    call = lambda z, **t: latent.make(**t).log_prob(z)  # noqa: E731
    truth = lambda z, **t: latent.total(log_prob_of(latent.prior, latent.rows(z), t))  # noqa: E731
    return Case(call, tensors, truth, settings={"prior": latent.prior.kind, "positions": positions})


def prior_kl(d: Draw, positions=(), kinds=KINDS, method=None) -> Case:
    latent = _Latent(d, positions, kinds)
    prior = latent.prior
    if prior.kind == "flow":  # whose samples are of the posterior's dtype, and not rounded to 16 bits here
        d.dtypes, d.dtype = [compute_dtype(prior.tensors)], compute_dtype(prior.tensors)
    q, seed, count = latent.posterior(d), d.seed(), d.pick((1, 2, 3))
    tensors = {**q.tensors, **prior.tensors}
    methods = ("mc", "mc", "upper", "lower", *(("relaxed", "given") if prior.kind != "full" else ()))
    methods = (*methods, *(() if positions else ("bounds",)))
    method = (method or d.pick(methods)) if prior.is_mixture else "mc"
    settings = {"prior": prior.kind, "method": method, "positions": positions, **q.settings}
    how = {"entropy": d.pick(("closed", "sampled")), "gradient": d.pick(("plain", "stl"))}
    if method in ("relaxed", "given"):
        how = {"tau": d.pick((0.5, 1.0, 2.0))}
    how = how if method == "given" else how | {"num_samples": count, "seed": seed}
    settings |= how
    own = compute_dtype(q.tensors)
    zero = latent.rows(torch.zeros(q.shape, dtype=own, device=DEVICE).flatten(len(q.shape) - q.ndim))
    if method in ("relaxed", "given"):
        choices = (count, *zero.shape[:-1], tensors["prior_logits"].shape[0])
    if method == "given":
        tensors["z"] = d.tensor(spread_rows(d, (count, *q.shape[: len(q.shape) - q.ndim], latent.event)))
        tensors["gumbel"] = (-torch.log(-torch.log(d.uniform(choices, 1e-6)))).to(own).to(DEVICE)

    def call(**t):
        p, posterior = latent.make(**t), q.make(**t)
        if method == "bounds":
            return p.kl_bounds(posterior)
        if method == "given":
            return p.kl_relaxed(posterior, t["z"], how["tau"], gumbel=t["gumbel"])
        if prior.kind in ("standard", "normal"):
            return p.kl(posterior)
        return p.kl(posterior, method=method, **how)

    def truth(noise=None, z=None, gumbel=None, **t):
        mu, logvar = (latent.rows(part.flatten(len(q.shape) - q.ndim)) for part in q.parts(**t))
        if prior.kind in ("standard", "normal"):
            return latent.total(oracle.kl_elements(mu, logvar, t.get("prior_mu"), t.get("prior_logvar")).sum(-1))
        if method == "mc":
            eps = {"eps": noise, "entropy_form": how["entropy"], "gradient": how["gradient"]}
            return latent.total(oracle.sampled_kl(mu, logvar, lambda z: log_prob_of(prior, z, t), **eps))
        mixture = prior.mixture(**t)
        if method == "relaxed":
            z, gumbel = mu + torch.exp(0.5 * logvar) * noise[..., : latent.size], noise[..., latent.size :]
        if method in ("relaxed", "given"):
            z = z if method == "relaxed" else latent.rows(z)
            return latent.total(kl_components(mu, logvar, z, gumbel, how["tau"], *mixture[:3]))
        found = [latent.total(oracle.kl_gmm(mu, logvar, *mixture, method=m)) for m in ("lower", "upper")]
        return found if method == "bounds" else found[method == "upper"]

    def noise():
        eps = fastkl.rsample_normal(zero, zero, num_samples=count, seed=seed).double()
        if method == "mc":
            return eps, 1e-6
        even = torch.zeros(choices, dtype=own, device=DEVICE)
        gumbel = draw_choice(Stream.KL_CHOICE, even, 1.0, False, -1, seed).double().log()  # and a number for all
        uncertain = torch.tensor([1e-6] * latent.size + [4e-6] * choices[-1], dtype=torch.float64)
        return torch.cat([eps, gumbel], -1), uncertain

    noisy = method == "relaxed" or (method == "mc" and prior.kind not in ("standard", "normal"))
    return Case(call, tensors, truth, noise if noisy else None, settings)


def prior_rsample(d: Draw, positions=(), kinds=KINDS) -> Case:
    latent = _Latent(d, positions, kinds)
    prior, size, shape = latent.prior, latent.size, d.pick(((5,), (2, 3), (1,)))
    seed, tau = d.seed(), 1.0 if positions else d.pick((0.5, 1.0, 2.0))
    dtype = compute_dtype({n: t for n, t in prior.tensors.items() if "logits" not in n})
    k = prior.tensors["prior_logits"].shape[0] if prior.is_mixture else 0
    rows = (*shape, math.prod(positions)) if positions else shape
    how = {"num_samples": math.prod(rows), "seed": seed}

    def noise():
        zeros = torch.zeros(size, dtype=dtype, device=DEVICE)
        if prior.kind == "flow":
            with torch.random.fork_rng():
                torch.manual_seed(int(seed))
                return torch.randn((*rows, size), dtype=dtype, device=DEVICE).double(), 0.0
        if not prior.is_mixture:
            plain = priors.LearnedNormal(size)
            del plain.mu, plain.logvar
            plain.mu = plain.logvar = zeros
            return plain.rsample(rows, seed=seed).double().detach(), 4e-6
        narrow = torch.full((k, 1), -2000.0, dtype=dtype, device=DEVICE)
        even = torch.zeros(k, dtype=dtype, device=DEVICE)
        chosen = fastkl.rsample_gmm(even, torch.eye(k, dtype=dtype, device=DEVICE), narrow, **how).double().log()
        eps = fastkl.rsample_gmm(even, zeros.expand(k, size), **how).double()
        return torch.cat([chosen, eps], -1), 4e-6

    def truth(noise, **t):
        if prior.kind == "flow":
            return latent.flat(torch.sinh(t["prior_loc"] + torch.exp(t["prior_log_scale"]) * noise))
        if not prior.is_mixture:
            zero = torch.zeros(size, dtype=noise.dtype)
            spread = torch.exp(0.5 * t.get("prior_logvar", zero))
            return latent.flat(t.get("prior_mu", zero) + spread * noise)
        logits, means, logvars, scale_tril = prior.mixture(**t)
        gumbel, eps = noise[..., :k], noise[..., k:]
        perturbed = logits.masked_fill(logits.isinf(), -1e30) + gumbel
        soft = oracle.relaxed(perturbed, tau)
        y = torch.zeros_like(soft).scatter(-1, perturbed.argmax(-1, keepdim=True), 1.0) + (soft - soft.detach())
        if scale_tril is not None:
            z = y @ means + torch.einsum("nk,kij,nj->ni", y, scale_tril, eps)
        else:
            z = y @ means + (y @ torch.exp(0.5 * logvars).expand(means.shape)) * eps
        return latent.flat(z.view(*rows, size))

    draw = lambda **t: latent.make(**t).rsample(shape, seed=seed, **({"tau": tau} if k and not positions else {}))  # noqa: E731
    settings = {"prior": prior.kind, "tau": tau, "shape": shape, "positions": positions}
    return Case(draw, prior.tensors, truth, noise, settings, dtype)


CALLS = (prior_log_prob, prior_kl, prior_rsample)


def per_position(d: Draw) -> Case:
    return d.pick(CALLS)(d, POSITIONS)


def flow(d: Draw) -> Case:
    return d.pick(CALLS)(d, d.pick(((), (), POSITIONS)), ("flow",))


def kl_relaxed(d: Draw) -> Case:
    """With noise from a seed."""
    return prior_kl(d, d.pick(((), POSITIONS)), ("diag", "spherical", "tied", "vamp"), "relaxed")
