"""Calls of the ops of Gaussian mixtures."""

from __future__ import annotations

import numpy as np
import torch
from fuzz_noise import uniform

import fastkl

import fuzz_oracle as oracle
from fuzz_check import Case, compute_dtype
from fuzz_inputs import Draw
from helpers import DEVICE


def mixture(d: Draw, batch: tuple[int, ...], size: int, *, own=True) -> dict:
    """logits, means, and logvars, or scale_tril, or neither; some for each datum."""
    k = min(d.size(17), 17)
    of = [batch if own and batch != (0,) and d.chance(0.15) else () for _ in range(3)]
    logits = d.normal((*of[0], k)) * d.pick((0.0, 1.0, 5.0))
    if k > 1 and d.chance(0.15):
        logits[..., d.random.randrange(k)] = float("-inf")
    means = d.location((*of[1], k, size)) / (30 if d.level in ("large", "every") else 1)
    tensors = {"logits": d.tensor(logits, expand=False), "means": d.tensor(means, expand=False)}
    kind = d.pick(("none", "diagonal", "diagonal", "spherical", "tied", "tied", "full"))
    kind = "diagonal" if kind == "full" and size > 17 else kind
    if kind == "full":
        lower = 0.3 * d.normal((*of[2], k, size, size)).tril(-1) / size**0.5
        lower = lower + torch.diag_embed(d.uniform((*of[2], k, size), 0.5, 2.0))
        if d.chance(0.3):
            lower = lower + d.normal(lower.shape).triu(1)  # not read
        tensors["scale_tril"] = d.tensor(lower, expand=False)
    elif kind != "none":
        shape = {"diagonal": (k, size), "spherical": (k, 1), "tied": d.pick(((1, size), (size,)))}[kind]
        shape = (*of[2], *shape) if len(shape) > 1 else shape
        tensors["logvars"] = d.tensor(d.logvar(shape, -8.0, 8.0), expand=False)
    return tensors


def spread_rows(d: Draw, shape):
    return d.location(shape) / (30 if d.level in ("large", "every") else 1)


def mixture_of(t):
    return t["logits"], t["means"], t.get("logvars"), t.get("scale_tril")


def near_rows(d: Draw) -> tuple[tuple[int, ...], int]:
    return d.batch(33), min(40, d.size(33))


def gmm_precision(d: Draw) -> Case:
    """A square expanded around the mean of the means: as exact as the expansion is, each product rounded to tf32."""
    d.dtype, d.mixed = d.pick((torch.float32, torch.bfloat16, torch.float16)), False
    batch, size = near_rows(d)
    tensors = {"z": d.tensor(spread_rows(d, (*batch, size))), **mixture(d, batch, size, own=False)}
    precision = d.pick(("tf32x3", "tf32"))
    op = d.pick((fastkl.gmm_log_prob, fastkl.gmm_responsibilities))

    def truth(z, **t):
        logits, means, logvars, scale_tril = mixture_of(t)
        if scale_tril is not None:  # by differences in any case
            joint = oracle.joint(z, logits, means, logvars, scale_tril)
        else:
            centre = means.detach().mean(0)
            spread = torch.zeros_like(means) if logvars is None else logvars.expand(means.shape)
            x, m, s = z - centre, means - centre, torch.exp(-spread)
            squares = x.square() @ s.mT - 2 * x @ (m * s).mT + (m.square() * s).sum(-1)
            log_weights = logits - logits.logsumexp(-1, keepdim=True)  # of which the gradient is a difference
            joint = log_weights - 0.5 * (squares + (spread + oracle.LOG_2PI).sum(-1))
        total = joint.logsumexp(-1, keepdim=True)
        return total.squeeze(-1) if op is fastkl.gmm_log_prob else joint - total

    rounded = torch.float16 if precision == "tf32" else None  # which has as many digits
    call = lambda **t: op(**t, precision=precision)  # noqa: E731
    return Case(call, tensors, truth, settings={"precision": precision}, rounded=rounded, together=True)


def gmm(op, ending):
    def case(d: Draw) -> Case:
        batch, size = near_rows(d)
        tensors = {"z": d.tensor(spread_rows(d, (*batch, size))), **mixture(d, batch, size)}
        return Case(op, tensors, lambda **t: ending(oracle.joint(t["z"], *mixture_of(t))))

    return case


def gmm_moments(d: Draw) -> Case:
    batch, size = near_rows(d)
    tensors = {"z": d.tensor(spread_rows(d, (*batch, size))), **mixture(d, batch, size, own=False)}
    truth = lambda **t: oracle.moments(t["z"], *mixture_of(t))  # noqa: E731
    # Under full covariances differences come back from whitened ones.
    return Case(fastkl.gmm_moments, tensors, truth, together="scale_tril" in tensors)


def posterior_rows(d: Draw, batch, size) -> dict:
    shape = (*batch, size)
    second = shape if d.chance(0.8) else (size,)
    return {"mu": d.tensor(spread_rows(d, shape)), "logvar": d.tensor(d.logvar(second, -8.0, 4.0))}


def kl_gmm(d: Draw) -> Case:
    batch, size = near_rows(d)
    tensors = {**posterior_rows(d, batch, size), **mixture(d, batch, size)}
    method, seed, count = d.pick(("mc", "mc", "upper", "lower")), d.seed(), d.pick((1, 2, 3))
    settings = {"method": method}
    if method != "mc":
        op = lambda **t: fastkl.kl_gmm(**t, **settings)  # noqa: E731
        truth = lambda **t: oracle.kl_gmm(t["mu"], t["logvar"], *mixture_of(t), method=method)  # noqa: E731
        return Case(op, tensors, truth, settings=settings)
    form, gradient = d.pick(("closed", "sampled")), d.pick(("plain", "stl"))
    settings |= {"entropy": form, "gradient": gradient, "num_samples": count, "seed": seed}
    zero = torch.zeros((*batch, size), dtype=compute_dtype(tensors), device=DEVICE)

    def noise():
        return fastkl.rsample_normal(zero, zero, num_samples=count, seed=seed).double(), 1e-6

    def truth(noise, **t):
        how = {"eps": noise, "entropy_form": form, "gradient": gradient}
        return oracle.kl_gmm(t["mu"], t["logvar"], *mixture_of(t), **how)

    return Case(lambda **t: fastkl.kl_gmm(**t, **settings), tensors, truth, noise, settings)


def kl_gmm_bounds(d: Draw) -> Case:
    batch, size = near_rows(d)
    tensors = {**posterior_rows(d, batch, size), **mixture(d, batch, size)}

    def truth(**t):
        return [oracle.kl_gmm(t["mu"], t["logvar"], *mixture_of(t), method=m) for m in ("lower", "upper")]

    return Case(fastkl.kl_gmm_bounds, tensors, truth)


def batch_of(tensors) -> torch.Size:
    events = {"logits": 1, "means": 2, "logvars": 2, "scale_tril": 3}
    return torch.broadcast_shapes(*(t.shape[: max(0, t.dim() - events[name])] for name, t in tensors.items()))


def sample_gmm(d: Draw) -> Case:
    """The component by inversion of the distribution function; the noise is found in the sample of N(0, I)."""
    size = min(17, d.size(17))
    tensors = {name: t.detach() for name, t in mixture(d, d.pick(((), (3,), (d.size(9),))), size).items()}
    how, batch = {"num_samples": d.pick((1, 4, 30)), "seed": d.seed()}, batch_of(tensors)
    shape = (how["num_samples"], *batch)
    computed = compute_dtype({name: t for name, t in tensors.items() if name != "logits"})

    def noise():
        one = torch.zeros((*batch, 1, size), dtype=computed, device=DEVICE)
        return fastkl.sample_gmm(one[..., 0], one, **how)[0].double(), 1e-6

    def truth(noise, **t):
        logits, means, logvars, scale_tril = mixture_of(t)
        weights = tensors["logits"].double().cpu().softmax(-1).expand(*batch, -1).numpy()
        u = uniform(int(how["seed"]), shape)
        chosen = np.empty(shape, dtype=np.int64)
        for at in np.ndindex(shape):
            running = np.cumsum(weights[at[1:]])
            chosen[at] = np.searchsorted(running, u[at] * running[-1], side="right")
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(chosen), logits.shape[-1]).to(means.dtype)
        z = (one_hot.unsqueeze(-1) * means).sum(-2)
        if scale_tril is not None:
            z = z + torch.einsum("...k,...kij,...j->...i", one_hot, scale_tril.tril(), noise)
        else:
            spread = torch.zeros_like(means) if logvars is None else logvars
            z = z + torch.exp(0.5 * (one_hot.unsqueeze(-1) * spread).sum(-2)) * noise
        return z, torch.from_numpy(chosen)

    return Case(lambda **t: fastkl.sample_gmm(**t, **how), tensors, truth, noise, how, computed)


def rsample_gmm(d: Draw) -> Case:
    batch, size = d.pick(((), (3,), (d.size(9),))), min(17, d.size(17))
    tensors = mixture(d, batch, size)
    batch = batch_of(tensors)
    k, count, seed, tau = tensors["logits"].shape[-1], d.pick((None, 1, 4)), d.seed(), d.pick((0.5, 1.0, 2.0))
    dtype = compute_dtype({n: t for n, t in tensors.items() if n != "logits"})
    how = {"num_samples": count, "seed": seed}

    def noise():
        zeros = torch.zeros((*batch, k), dtype=dtype, device=DEVICE)
        one_hot = torch.eye(k, dtype=dtype, device=DEVICE)
        narrow = torch.full((k, 1), -2000.0, dtype=dtype, device=DEVICE)
        chosen = fastkl.rsample_gmm(zeros, one_hot, narrow, **how).double().log()
        zeros_of_means = torch.zeros((k, size), dtype=dtype, device=DEVICE)
        return torch.cat([chosen, fastkl.rsample_gmm(zeros, zeros_of_means, **how).double()], -1), 4e-6

    def truth(noise, **t):
        logits, means, logvars, scale_tril = mixture_of(t)
        gumbel, eps = noise[..., :k], noise[..., k:]
        y = oracle.relaxed(logits.masked_fill(logits.isinf(), -1e30) + gumbel, tau)
        z = (y.unsqueeze(-1) * means).sum(-2)
        if scale_tril is not None:
            return z + torch.einsum("...k,...kij,...j->...i", y, scale_tril.tril(), eps)
        if logvars is None:
            return z + eps
        return z + (y.unsqueeze(-1) * torch.exp(0.5 * logvars)).sum(-2) * eps

    return Case(lambda **t: fastkl.rsample_gmm(**t, tau=tau, **how), tensors, truth, noise, how | {"tau": tau}, dtype)
