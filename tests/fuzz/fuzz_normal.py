"""Calls of the ops of diagonal Gaussians, of likelihoods and of a relaxed choice."""

from __future__ import annotations

import torch

import fastkl

import fuzz_oracle as oracle
from fuzz_check import Case, Rounding, compute_dtype
from fuzz_inputs import Draw, parameter_of
from helpers import DEVICE

F64 = torch.float64


def broadcastable(d: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, or one that broadcasts to it."""
    if d.chance(0.7) or not shape:
        return shape
    kind = d.pick(("event", "ones", "scalar", "row"))
    if kind == "scalar":
        return ()
    if kind == "event":
        return shape[d.random.randrange(len(shape)) :]
    if kind == "row":
        return (*shape[:-1], 1)
    return tuple(1 if d.chance(0.4) else n for n in shape)


def bounds_of(d: Draw):
    if d.chance(0.6):
        return None
    low, high = d.pick(((-30.0, 20.0), (-1.0, 1.0), (-5.0, float("inf")), (float("-inf"), 2.0)))
    return (low, high) if d.chance(0.5) else fastkl.SoftBounds(low, high)


def event(d: Draw, least: int = 0) -> tuple[tuple[int, ...], int]:
    """(a shape, event_ndim, `least` or more)."""
    if d.chance(0.15):
        shape = (*d.batch(4), *d.pick(((2, 3), (3, 4, 4), (4, 3, 5), (1, 1, 1), (2, 8))))
        return shape, d.random.randint(least, min(4, len(shape)))
    if d.chance(0.05):
        return (d.size(33),), 1
    if d.chance(0.02):
        return d.pick(((3, 0), (0, 3), (9, 9000), (700, 130), (1, 70_000))), 1
    return (*d.batch(33), d.size(130)), 1


def gaussian(d: Draw, *, prior=True, least: int = 0) -> tuple[dict, dict, tuple[int, ...]]:
    """(mu, logvar, prior_mu, prior_logvar), (event_ndim, scale, bounds, prior_scale), and the posterior's shape."""
    shape, event_ndim = event(d, least)
    more = {}
    scale = d.pick(("logvar", "logvar", "logvar", "log_std", "std", "softplus"))
    first, second = shape, shape
    if d.chance(0.2):
        first, second = (shape, broadcastable(d, shape)) if d.chance(0.5) else (broadcastable(d, shape), shape)
    logvar = d.logvar(second)
    tensors = {"mu": d.tensor(d.location(first)), "logvar": d.tensor(parameter_of(logvar, scale))}
    if scale == "std":
        tensors["logvar"] = positive(tensors["logvar"])
    if prior and d.chance(0.5):
        if d.chance(0.85):
            tensors["prior_mu"] = d.tensor(d.location(broadcastable(d, shape)))
        if d.chance(0.85):
            logvar = d.logvar(broadcastable(d, shape))
            more["prior_scale"] = d.pick(("logvar", "logvar", "log_std", "std", "softplus"))
            tensors["prior_logvar"] = d.tensor(parameter_of(logvar, more["prior_scale"]))
            if more["prior_scale"] == "std":
                tensors["prior_logvar"] = positive(tensors["prior_logvar"])
    settings = {"event_ndim": event_ndim, "scale": scale, "bounds": bounds_of(d), **more}
    return tensors, settings, shape


def prior_logvar_of(given: torch.Tensor | None, settings: dict) -> torch.Tensor | None:
    return None if given is None else oracle.to_logvar(given, settings["prior_scale"])


def positive(std: torch.Tensor) -> torch.Tensor:
    """Replace zeros, which 16-bit rounding may produce."""
    with torch.no_grad():
        least = torch.finfo(std.dtype).tiny
        if std.numel() and std.min() < least:
            return std.detach().clone().clamp(min=least).requires_grad_(std.requires_grad)
    return std


def value_of(op, elements):
    def case(d: Draw) -> Case:
        tensors, settings, shape = gaussian(d, least=int(op is fastkl.kl_normal_per_dim))
        ndim = settings["event_ndim"]
        plain = {k: settings[k] for k in ("scale", "bounds")}

        def truth(**t):
            prior_logvar = prior_logvar_of(t.get("prior_logvar"), settings)
            arguments = [t["mu"], t["logvar"], t.get("prior_mu"), prior_logvar]
            full = torch.broadcast_shapes(shape, *(a.shape for a in arguments if a is not None))
            values = elements(*arguments, **plain).expand(full)
            if op is not fastkl.kl_normal_per_dim:
                return oracle.last(values, ndim)
            return values if values.dim() == ndim else values.flatten(0, -ndim - 1).mean(0)

        return Case(lambda **t: op(**t, **settings), tensors, truth, settings=settings)

    return case


def drawn(d: Draw, tensors, shape, num_samples, seed):
    """(arguments for the noise, the same again), that of a seed found in the sample of a standard normal."""
    full = shape if num_samples is None else (num_samples, *shape)
    if d.chance(0.3):
        tensors["eps"] = d.tensor(d.normal(full) * (d.uniform(full) > 0.1))
        return {"num_samples": num_samples}, None
    dtype = compute_dtype(tensors)
    zero = torch.zeros(shape, dtype=dtype, device=DEVICE)
    uncertain = 3e-7 if all(t.itemsize >= 4 for t in tensors.values()) else 1e-6
    if dtype == torch.float64 and compute_dtype({n: t for n, t in tensors.items() if "prior" not in n}) != dtype:
        uncertain *= Rounding(torch.float64).times  # the prior's alone, and the noise is float32's

    def noise():
        return fastkl.rsample_normal(zero, zero, num_samples=num_samples, seed=seed).double(), uncertain

    return {"num_samples": num_samples, "seed": seed}, noise


def rsample_normal(d: Draw) -> Case:
    tensors, settings, shape = gaussian(d, prior=False)
    del settings["event_ndim"]
    how, noise = drawn(d, tensors, shape, d.pick((None, None, 1, 3)), d.seed())

    def truth(mu, logvar, eps=None, noise=None):
        return mu + torch.exp(0.5 * oracle.to_logvar(logvar, **settings)) * (noise if eps is None else eps)

    settings_ = settings | how
    return Case(lambda **t: fastkl.rsample_normal(**t, **settings_), tensors, truth, noise, settings_)


def rsample_kl(d: Draw) -> Case:
    tensors, settings, shape = gaussian(d)
    how, noise = drawn(d, tensors, shape, d.pick((None, None, 1, 3)), d.seed())
    ndim, plain = settings["event_ndim"], {k: settings[k] for k in ("scale", "bounds")}

    def truth(mu, logvar, prior_mu=None, prior_logvar=None, eps=None, noise=None):
        z = mu + torch.exp(0.5 * oracle.to_logvar(logvar, **plain)) * (noise if eps is None else eps)
        prior_logvar = prior_logvar_of(prior_logvar, settings)
        values = oracle.kl_elements(mu, logvar, prior_mu, prior_logvar, **plain).expand(shape)
        return z, oracle.last(values, ndim)

    settings_ = settings | how
    return Case(lambda **t: fastkl.rsample_kl(**t, **settings_), tensors, truth, noise, settings_)


def normal_log_prob(d: Draw) -> Case:
    shape, event_ndim = event(d)
    tensors = {
        "x": d.tensor(d.location(broadcastable(d, shape) if d.chance(0.1) else shape)),
        "mean": d.tensor(d.location(broadcastable(d, shape) if d.chance(0.3) else shape)),
        "logvar": d.tensor(d.logvar(broadcastable(d, shape))),
    }
    full = torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    if len(full) < event_ndim:
        tensors["x"] = d.tensor(d.location(shape))
        full = shape
    settings = {"event_ndim": event_ndim}

    def truth(**t):
        return oracle.last(oracle.normal_terms(**t).expand(full), event_ndim)

    return Case(lambda **t: fastkl.normal_log_prob(**t, **settings), tensors, truth, settings=settings)


def bernoulli_log_prob(d: Draw) -> Case:
    shape, event_ndim = event(d)
    kind = d.pick(("binary", "grey", "any"))
    x = d.normal(shape) if kind == "any" else d.uniform(shape)
    x = x.round() if kind == "binary" else x
    tensors = {"logits": d.tensor(d.location(broadcastable(d, shape) if d.chance(0.2) else shape)), "x": d.tensor(x)}
    settings = {"event_ndim": event_ndim}

    def truth(**t):
        return oracle.last(oracle.bernoulli_terms(**t), event_ndim)

    return Case(lambda **t: fastkl.bernoulli_log_prob(**t, **settings), tensors, truth, settings=settings)


def gumbel_softmax(d: Draw) -> Case:
    shape = (*d.batch(17), d.size(64))
    several = [dim for dim, n in enumerate(shape) if n > 1] if d.chance(0.9) else []
    dim = d.pick(several or [-1]) - len(shape) * d.chance(0.3) * bool(several)
    logits = d.location(shape) / (30 if d.level in ("large", "every") else 1)
    logits[(d.uniform(shape) < 0.1) & (d.index(shape, 2) == d.pick((1, 3)))] = float("-inf")
    tensors, tau, seed = {"logits": d.tensor(logits)}, d.pick((0.3, 0.7, 1.0, 2.0)), d.seed()
    number, kept = tau, torch.finfo(tensors["logits"].dtype)  # the sample is kept for the gradient, as it is rounded
    if d.chance(0.3):
        tensors["tau"] = d.tensor(torch.tensor(tau, dtype=F64), expand=False)
        number = None
    hard = d.chance(0.3)
    zero = torch.zeros(shape, dtype=compute_dtype({"logits": tensors["logits"]}), device=DEVICE)

    def noise():
        found = fastkl.gumbel_softmax(zero, 1.0, dim=dim, seed=seed).double().log()
        uncertain = torch.tensor([4e-6, kept.eps], dtype=F64).view(2, *[1] * len(shape))
        return torch.stack([found, torch.zeros_like(found)]), uncertain

    def truth(logits, tau=number, noise=None):
        noise, rounding = noise
        logits = logits.masked_fill(logits.isinf(), -1e30) if logits.isinf().any() else logits
        # A hard sample draws the soft one again for its gradient, without rounding it.
        soft = oracle.relaxed(logits + noise, tau, dim, 0.0 if hard else rounding, kept.tiny)
        soft = soft.masked_fill((logits < -1e29).all(dim, keepdim=True), 0.0)
        if not hard:
            return soft
        most = torch.zeros_like(soft).scatter(dim, (logits + noise).argmax(dim, keepdim=True), 1.0)
        return most.masked_fill((logits < -1e29).all(dim, keepdim=True), 0.0) + (soft - soft.detach())

    settings = {"dim": dim, "seed": seed, "hard": hard} | ({} if number is None else {"tau": number})
    return Case(lambda **t: fastkl.gumbel_softmax(**t, **settings), tensors, truth, noise, settings)
