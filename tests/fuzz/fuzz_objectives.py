"""Calls of the objectives: losses, records and gradients, compared with formulas in float64."""

from __future__ import annotations

import math

import torch
from fuzz_priors import GAUSSIANS, Prior, kl_components, log_prob_of, prior_of, rows_of

from fastkl import objectives, remedies

import fuzz_oracle as oracle
from fuzz_check import Case
from fuzz_inputs import Draw


class _Task:
    """A posterior, a prior, a decoder and noise. The posterior is of float32 at least, whose z is not rounded away."""

    def __init__(self, d: Draw, kinds, samples: int):
        d.mixed = False
        d.dtype = d.dtype if d.dtype.itemsize > 2 else torch.float32
        d.level = {"large": "ordinary", "every": "ordinary"}.get(d.level, d.level)  # weights are not all of one sample
        size = min(8, d.size(8))
        self.q = rows_of(d, size)
        kind = d.pick(kinds)
        self.prior: Prior | None = kind and prior_of(d, size, (kind,))
        self.tensors = {**self.q.tensors, **(self.prior.tensors if self.prior else {})}
        self.tensors["x"] = d.tensor(d.normal(self.q.shape))
        self.tensors["eps"] = d.tensor(d.normal((samples, *self.q.shape)))
        self.samples = samples

    def given(self, t):
        """The arguments for an objective of fastkl."""
        prior = self.prior.make(**t) if self.prior else None
        return self.q.make(**t), prior, lambda z: decoded(z, t["x"])

    def z(self, t, fixed=False):
        mu, logvar = self.q.parts(**t)
        return mu + torch.exp(0.5 * logvar) * t["eps"]

    def log_prior(self, z, t):
        return log_prob_of(self.prior, z, t) if self.prior else standard(z)

    def closed(self, t):
        """The KL if the prior is one Gaussian."""
        return oracle.kl_elements(*self.q.parts(**t), t.get("prior_mu"), t.get("prior_logvar")).sum(-1)

    def kl(self, t, method="mc", tau=1.0):
        mu, logvar = self.q.parts(**t)
        if self.prior is None or self.prior.kind in GAUSSIANS:
            return self.closed(t)
        if method == "upper":
            return oracle.kl_gmm(mu, logvar, *self.prior.mixture(**t), method="upper")
        z = self.z(t)
        if method == "relaxed":
            return kl_components(mu, logvar, z, t["gumbel"], tau, *self.prior.mixture(**t)[:3])
        return -oracle.entropy(logvar) - self.log_prior(z, t).mean(0)


def decoded(z, x):
    return -0.5 * (z - x).square().sum(-1)


def standard(z):
    return -0.5 * (oracle.LOG_2PI + z.square()).sum(-1)


def record(loss, *terms):
    return [loss, *(term.detach().mean() for term in terms)]


def outputs(found):
    return [found.loss, *found.terms.values()]


def elbo(d: Draw) -> Case:
    task = _Task(d, (None, "standard", "normal", "diag", "tied", "vamp", "full"), d.pick((1, 2)))
    mixed = task.prior is not None and task.prior.is_mixture
    method = d.pick(("mc", "mc", "upper", *(("relaxed",) if task.prior and task.prior.kind != "full" else ())))
    method = method if mixed else "mc"
    beta, tau, remedy = d.pick((0.0, 0.5, 1.0, 4.0)), d.pick((0.5, 1.0)), d.pick((None, "capacity", "sample", "batch"))
    if method == "relaxed":
        gumbel = -torch.log(
            -torch.log(d.uniform((*task.tensors["eps"].shape[:-1], len(task.tensors["prior_logits"])), 1e-6))
        )
        task.tensors["gumbel"] = gumbel.to(task.tensors["eps"])
    settings = {"beta": beta, "num_samples": task.samples, "method": method, "tau": tau}

    def call(**t):
        how = settings | {"eps": t["eps"], "gumbel": t.get("gumbel")}
        if remedy == "capacity":
            return outputs(objectives.beta_vae(*task.given(t), capacity=0.7, **how))
        if remedy is None:
            return outputs(objectives.elbo(*task.given(t), **how))
        kl_first = remedy == "sample"
        chosen = lambda q, kl: remedies.free_bits(kl if kl_first else q, 0.3, per=remedy)  # noqa: E731
        return outputs(objectives.elbo(*task.given(t), **how, remedy=chosen))

    def truth(**t):
        kl, reconstruction = task.kl(t, method, tau), decoded(task.z(t)[0], t["x"])
        terms = [reconstruction - kl, reconstruction, kl]
        if remedy is None:
            return record((beta * kl - reconstruction).mean(), *terms)
        if remedy == "batch":
            means = oracle.kl_elements(*task.q.parts(**t)).flatten(0, -2).mean(0)
            penalty = means.clamp(min=0.3).sum()
        else:
            penalty = {"capacity": lambda: (kl - 0.7).abs(), "sample": lambda: kl.clamp(min=0.3)}[remedy]()
        return record(beta * penalty.mean() - reconstruction.mean(), *terms, penalty)

    # A mean of values of both signs is as exact as they are.
    shown = settings | {"remedy": remedy, "prior": task.prior and task.prior.kind, **task.q.settings}
    return Case(call, task.tensors, truth, settings=shown)


def importance(d: Draw) -> Case:
    name, gradient = d.pick(("iwae", "miwae", "ciwae", "piwae")), d.pick(("plain", "stl", "dreg"))
    estimates, count = d.pick((1, 2)) if name in ("miwae", "piwae") else 1, d.pick((1, 2, 5))
    task = _Task(d, (None, "normal", "diag", "full"), estimates * count)
    beta = d.pick((0.0, 0.3, 1.0))
    settings = {"num_samples": count, "gradient": gradient}
    settings |= (
        {"num_estimates": estimates} if name in ("miwae", "piwae") else {"beta": beta} if name == "ciwae" else {}
    )

    def call(**t):
        return outputs(getattr(objectives, name)(*task.given(t), **settings, eps=t["eps"]))

    def truth(**t):
        mu, logvar = task.q.parts(**t)
        z = task.z(t)

        def log_w(z, mu, logvar):
            return decoded(z, t["x"]) + task.log_prior(z, t) - oracle.normal_terms(z, mu, logvar).sum(-1)

        def grouped(values):
            return values.reshape(estimates, count, *values.shape[1:])

        def bound_of(values):
            iwae = values.logsumexp(1) - math.log(count)
            return (beta * values.mean(1) + (1 - beta) * iwae if name == "ciwae" else iwae).mean(0)

        plain = log_w(z, mu, logvar)
        values = grouped(plain)
        together = plain.logsumexp(0) - math.log(len(plain))
        bound = together if name == "piwae" else bound_of(values)
        v = values.detach().softmax(1)
        # What prior and decoder get: the bound's own gradient, with z standing still.
        still = log_w(z.detach(), mu.detach(), logvar.detach())
        outer = still.logsumexp(0) - math.log(len(still)) if name == "piwae" else bound_of(grouped(still))
        # What the encoder gets, by each weight's gradient: through z alone, or through its parameters, too.
        x, prior = t["x"].detach(), {n: a.detach() for n, a in t.items() if n.startswith("prior_")}
        moved = decoded(z, x) + (log_prob_of(task.prior, z, prior) if task.prior else standard(z))
        q_of = (mu, logvar) if gradient == "plain" else (mu.detach(), logvar.detach())
        moved = grouped(moved - oracle.normal_terms(z, *q_of).sum(-1))
        power = v.square() if gradient == "dreg" else v
        share = beta / count + (1 - beta) * power if name == "ciwae" else power
        inner = (share * moved).sum(1).mean(0)
        surrogate = outer - outer.detach() + inner - inner.detach()
        loss = -(bound.detach() + surrogate).mean()
        terms = [bound] + ([bound_of(values)] if name == "piwae" else [])
        w = values.detach()
        reconstruction = decoded(z, t["x"])
        terms += [reconstruction, reconstruction - plain]
        sizes = (oracle.effective_sample_size(w, 1), oracle.weight_entropy(w, 1))
        return record(loss, *terms, *sizes)

    return Case(call, task.tensors, truth, settings=settings | {"objective": name, **task.q.settings}, together=True)


def clusters(d: Draw) -> Case:
    """vade, and the total correlation's objective."""
    task = _Task(d, ("diag", "spherical", "tied", "full", "vamp"), d.pick((1, 2)))
    beta = d.pick((0.0, 1.0, 3.0))
    settings = {"beta": beta, "num_samples": task.samples}

    def truth(**t):
        mu, logvar = task.q.parts(**t)
        z, mixture = task.z(t), task.prior.mixture(**t)
        log_pi = mixture[0] - mixture[0].logsumexp(-1, keepdim=True)
        joint = oracle.joint(z, *mixture)
        log_r = joint - joint.logsumexp(-1, keepdim=True)
        out = log_pi == float("-inf")
        each = oracle.joint(mu, mixture[0].masked_fill(out, 0.0), *mixture[1:], variance=logvar.exp(), form="expected")
        each = each - (mixture[0].masked_fill(out, 0.0) - mixture[0].masked_fill(out, 0.0).logsumexp(-1, keepdim=True))
        r = log_r.exp()
        kl_latent = (-oracle.entropy(logvar) - (r * each).sum(-1)).mean(0)
        kl_choice = (r * (log_r - log_pi).masked_fill(out | (r == 0), 0.0)).sum(-1).mean(0)
        reconstruction, kl = decoded(z, t["x"]).mean(0), kl_latent + kl_choice
        return record((beta * kl - reconstruction).mean(), reconstruction - kl, reconstruction, kl, kl_choice)

    call = lambda **t: outputs(objectives.vade(*task.given(t), **settings, eps=t["eps"]))  # noqa: E731
    return Case(
        call, task.tensors, truth, settings=settings | {"prior": task.prior.kind, **task.q.settings}, together=True
    )


def matching(d: Draw) -> Case:
    """wae_mmd, info_vae and beta_tc_vae, which compare the rows of a batch with each other."""
    name = d.pick(("wae_mmd", "info_vae", "beta_tc_vae"))
    kinds = (None, "standard") if name == "beta_tc_vae" else (None, "normal", "diag")
    task = _Task(d, kinds, 1)
    rows = math.prod(task.q.shape[:-1])
    weights, size = d.pick(("mss", "mws")), rows + d.pick((1, 100))
    if name != "beta_tc_vae":
        task.tensors["prior_samples"] = d.tensor(d.normal((max(2, d.size(9)), task.q.shape[-1])), expand=False)
    kernel, estimator, alpha = d.pick(("imq", "rbf")), "biased" if rows < 2 else d.pick(("biased", "unbiased")), 0.25
    settings = {"kernel": kernel, "estimator": estimator} | ({"alpha": alpha} if name == "info_vae" else {})
    settings = {"dataset_size": size, "weights": weights} if name == "beta_tc_vae" else settings | {"penalty": 2.0}

    def call(**t):
        how = {"eps": t["eps"]} | ({"prior_samples": t["prior_samples"]} if "prior_samples" in t else {})
        return outputs(getattr(objectives, name)(*task.given(t), **settings, **how))

    def truth(**t):
        z, scales = task.z(t), (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
        reconstruction = decoded(z[0], t["x"])
        if name == "beta_tc_vae":
            parameters = (a.flatten(0, -2) for a in (z[0], *task.q.parts(**t)))
            parts = oracle.total_correlation(*parameters, size, weights)
            loss = sum(f * part.mean() for f, part in zip((1.0, 6.0, 1.0), parts)) - reconstruction.mean()
            return record(loss, reconstruction, sum(parts), *parts)
        distance = oracle.mmd(z.flatten(0, -2), t["prior_samples"], kernel, scales, estimator == "unbiased")
        kl, share = task.kl(t), 0.0
        penalty = 2.0 if name == "wae_mmd" else alpha + 2.0 - 1
        share = 0.0 if name == "wae_mmd" else 1 - alpha
        return record(penalty * distance + share * kl.mean() - reconstruction.mean(), reconstruction, kl, distance)

    if rows < 2 and name == "beta_tc_vae":
        return elbo(d)
    shown = settings | {"objective": name, "prior": task.prior and task.prior.kind, **task.q.settings}
    return Case(call, task.tensors, truth, settings=shown, together=True)
