"""Calls of the ops that compare samples, of importance weights and of full covariances."""

from __future__ import annotations

import torch

import fastkl
from fastkl.ops.normal.rsample_normal import draw_normal
from fastkl.reference import Stream

import fuzz_oracle as oracle
from fuzz_check import Case, compute_dtype
from fuzz_inputs import Draw
from fuzz_mixtures import spread_rows
from fuzz_normal import broadcastable
from helpers import DEVICE

F64 = torch.float64


def importance(op, ending):
    def case(d: Draw) -> Case:
        shape = (d.size(33), *d.pick(((), (d.size(9),), (2, 3))))
        dim = d.random.randrange(-len(shape), len(shape))
        log_w = d.location(shape)
        if shape[dim] > 1 and d.chance(0.3):
            log_w.select(dim, 0).fill_(float("-inf"))
        tensors, settings = {"log_w": d.tensor(log_w, expand=False)}, {"dim": dim}
        truth = lambda log_w: ending(log_w, dim)  # noqa: E731
        return Case(lambda log_w: op(log_w, dim), tensors, truth, settings=settings, together=True)

    return case


def total_correlation(d: Draw) -> Case:
    n, size = max(2, d.size(17)), min(33, d.size(33))
    shape = (n, size)
    mu, logvar = spread_rows(d, broadcastable(d, shape)), d.logvar(broadcastable(d, shape), -6.0, 6.0)
    z = mu + torch.exp(0.5 * logvar) * d.normal(shape)  # a row far from its own posterior is none of a batch's
    tensors = {
        "z": d.tensor(z, expand=False),
        "mu": d.tensor(mu, expand=False),
        "logvar": d.tensor(logvar, expand=False),
    }
    settings = {"dataset_size": n + d.pick((0, 1, 1000)), "weights": d.pick(("mss", "mws"))}
    return Case(
        lambda **t: fastkl.total_correlation(**t, **settings), tensors,
        lambda **t: oracle.total_correlation(**t, **settings), settings=settings, together=True,
    )  # fmt: skip


def points(d: Draw, *, least=2):
    size = min(33, d.size(33))
    return (max(least, d.size(17)), size), (max(least, d.size(17)), size)


def scales_of(d: Draw):
    return d.pick((fastkl.reference.MMD_SCALES, (1.0,), (0.5, 2.0)))


def mmd(d: Draw) -> Case:
    first, second = points(d)
    tensors = {"x": d.tensor(spread_rows(d, first)), "y": d.tensor(spread_rows(d, second))}
    kernel, estimator, scales = d.pick(("imq", "rbf")), d.pick(("unbiased", "biased")), scales_of(d)
    settings = {"kernel": kernel, "estimator": estimator, "scales": scales}
    truth = lambda **t: oracle.mmd(**t, kernel=kernel, scales=scales, unbiased=estimator == "unbiased")  # noqa: E731
    return Case(lambda **t: fastkl.mmd(**t, **settings), tensors, truth, settings=settings, together=True)


def mmd_normal(d: Draw) -> Case:
    shape = points(d)[0]
    tensors = {"mu": d.tensor(spread_rows(d, shape))}
    if d.chance(0.7):
        tensors["logvar"] = d.tensor(d.logvar(shape if d.chance(0.7) else shape[1:], -8.0, 4.0))
    estimator, scales = d.pick(("unbiased", "biased")), scales_of(d)
    settings = {"estimator": estimator, "scales": scales}

    def truth(mu, logvar=None):
        return oracle.mmd_normal(mu, logvar, scales, estimator == "unbiased")

    return Case(lambda **t: fastkl.mmd_normal(**t, **settings), tensors, truth, settings=settings, together=True)


def sliced_wasserstein(d: Draw) -> Case:
    d.level = d.level if d.level in ("ordinary", "tiny", "large") else "ordinary"  # whose points have no ties
    first, second = points(d, least=1)
    tensors = {
        name: d.tensor(d.location(s), d.pick((F64, torch.float32)), expand=False)
        for name, s in (("x", first), ("y", second))
    }
    count, p, seed = d.pick((1, 5, 40)), d.pick((1, 1.5, 2, 3)), d.seed()
    settings = {"num_projections": count, "p": p, "seed": seed}
    zero = torch.zeros((), dtype=compute_dtype(tensors), device=DEVICE)

    def noise():
        tensor = torch.as_tensor(seed, device=DEVICE)
        return draw_normal(Stream.DIRECTIONS, (count, first[1]), zero, zero, tensor).double(), 0.0

    def truth(x, y, noise):
        return oracle.sliced(x, y, noise / noise.norm(dim=1, keepdim=True), p)

    return Case(lambda **t: fastkl.sliced_wasserstein(**t, **settings), tensors, truth, noise, settings)


def multivariate(op, truth):
    def case(d: Draw) -> Case:
        batch, size = d.batch(9), min(9, d.size(9))
        tensors = {}
        for side in "qp":
            own = batch if d.chance(0.6) else ()
            loc = d.tensor(d.location((*own, size)) / (30 if d.level in ("large", "every") else 1), expand=False)
            diagonal = d.uniform((*own, size), 0.5, 2.0)
            if d.chance(0.6):
                diagonal = torch.diag_embed(diagonal) + 0.3 * d.normal((*own, size, size)).tril(-1)
            tensors |= {f"loc_{side}": loc, f"scale_{side}": d.tensor(diagonal, expand=False)}
        names = {"loc_q": "mu", "scale_q": "scale_tril", "loc_p": "prior_mu", "scale_p": "prior_scale_tril"}
        call = lambda **t: op(**{names.get(k, k): v for k, v in t.items()})  # noqa: E731
        return Case(call, tensors, truth, together=True)

    return case
