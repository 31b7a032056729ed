"""The cases of bench/gpu.py: ops by the traffic of their forward pass, and mixtures and pairs by their size."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkl
from bench import bench_gmm_log_prob, bench_mmd, bench_total_correlation
from bench import bench_gumbel_softmax as gumbel
from bench import bench_normal_log_prob as normal
from bench import bench_wasserstein2_normal as wasserstein2
from bench.case import Case, leaves
from fastkl import reference

MIB = 1 << 20
LATENT, PIXELS, CLASSES = 1024, 3072, 512  # columns: a 16 x 8 x 8 latent, a 32 x 32 image, a codebook
SEED = 0
SAFETY = 1 << 21  # elements per block for the definition


class Timed(NamedTuple):
    """One op at one size.

    `part(at, rows, shared)` is the definition on the slice `at` of the rows: it gets these rows of the first inputs and
    all of the last `shared` inputs. Its outputs are concatenated, or added with `summed`. If it is None, `case` has the
    definition.
    """

    inputs: list[Tensor]
    functions: dict[str, Callable]  # contender -> function; torch.compile compiles "eager"
    part: Callable | None
    rows: int
    budget: str = ""
    shared: int = 0
    summed: bool = False
    block: int = 1
    checked: dict[str, Callable] = {}  # noqa: RUF012  contender -> the same function with the definition's noise
    triples: int = 0  # useful (n, k, d) of a forward pass
    # contender -> allowed error, relative to the largest value, for formulas less accurate than their dtype
    allowed: dict[str, float] = {}  # noqa: RUF012
    case: Case | None = None


class Job(NamedTuple):
    """The name of a case, from which another process can construct it."""

    op: str
    mib: int  # traffic of the forward pass; 0 for an op with one size
    dtype: torch.dtype = torch.float32
    compile: bool = False


def sums(function: Callable) -> Callable:
    """The `part` of a definition on independent rows."""
    return lambda at, rows, shared: function(*rows)


def two(device: str, rows: int, dtype: torch.dtype, count: int = 2, columns: int = LATENT) -> list[Tensor]:
    """Standard normal leaves, drawn on the device, because the host would take seconds."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(rows, columns, generator=generator, device=device) for _ in range(count)]
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def data(device: str, rows: int, dtype: torch.dtype) -> Tensor:
    """Pixels between 0 and 1, without gradient."""
    generator = torch.Generator(device).manual_seed(2)
    return torch.rand(rows, PIXELS, generator=generator, device=device).to(dtype)


def kl_normal(device, rows, dtype):
    eager = lambda m, v: 0.5 * (v.exp() + m**2 - 1 - v).sum(1)  # noqa: E731
    return two(device, rows, dtype), {"fastkl": fastkl.kl_normal, "eager": eager}, sums(reference.kl_normal), {}


def kl_normal_prior(device, rows, dtype):
    def eager(m, v, pm, pv):
        return 0.5 * (pv - v + (v - pv).exp() + (m - pm) ** 2 * (-pv).exp() - 1).sum(1)

    return two(device, rows, dtype, 4), {"fastkl": fastkl.kl_normal, "eager": eager}, sums(reference.kl_normal), {}


def kl_normal_packed(device, rows, dtype):
    fused = lambda head: fastkl.DiagonalNormal.from_packed(head).kl()  # noqa: E731
    eager = lambda head: kl_normal_eager(*head.chunk(2, 1))  # noqa: E731
    definition = lambda head: reference.kl_normal(*head.chunk(2, 1))  # noqa: E731
    return two(device, rows, dtype, 1, 2 * LATENT), {"fastkl": fused, "eager": eager}, sums(definition), {}


def kl_normal_eager(m, v):
    return 0.5 * (v.exp() + m**2 - 1 - v).sum(1)


def kl_normal_per_dim(device, rows, dtype):
    functions = {"fastkl": fastkl.kl_normal_per_dim, "eager": lambda m, v: 0.5 * (m**2 + v.exp() - 1 - v).mean(0)}
    part = lambda at, part, shared: len(part[0]) / rows * reference.kl_normal_per_dim(*part)  # noqa: E731
    return two(device, rows, dtype), functions, part, {"summed": True}


def wasserstein2_normal(device, rows, dtype):
    functions = {"fastkl": fastkl.wasserstein2_normal, "eager": wasserstein2.formula}
    return two(device, rows, dtype), functions, sums(reference.wasserstein2_normal), {}


def bernoulli_log_prob(device, rows, dtype):
    inputs = [*two(device, rows, dtype, 1, PIXELS), data(device, rows, dtype)]
    fused = lambda y, x: fastkl.bernoulli_log_prob(x, y, event_ndim=1)  # noqa: E731
    definition = lambda y, x: reference.bernoulli_log_prob(x, y, event_ndim=1)  # noqa: E731
    eager = lambda y, x: -F.binary_cross_entropy_with_logits(y, x, reduction="none").sum(-1)  # noqa: E731
    return inputs, {"fastkl": fused, "eager": eager}, sums(definition), {}


def normal_log_prob(device, rows, dtype):
    inputs = [data(device, rows, dtype), *two(device, rows, dtype, 2, PIXELS)]
    fused = functools.partial(fastkl.normal_log_prob, event_ndim=1)
    definition = functools.partial(reference.normal_log_prob, event_ndim=1)
    return inputs, {"fastkl": fused, "eager": normal.formula}, sums(definition), {}


def drawn(fused: Callable, eager: Callable, definition: Callable, noise: Callable) -> tuple[dict, Callable, dict]:
    """The functions of an op that draws noise. The check uses one seed, the timing the op's default."""
    checked = {"fastkl": lambda *t: fused(*t, seed=SEED), "eager": lambda *t: eager(*t, noise().to(t[0].dtype))}
    part = lambda at, rows, shared: definition(*rows, noise()[at].double())  # noqa: E731
    return {"fastkl": fused, "eager": eager}, part, {"checked": checked}


def normals(device: str, *shape: int) -> Callable[[], Tensor]:
    return functools.cache(lambda: reference.normal_noise(torch.tensor(SEED, device=device), shape))


def sample(mu, logvar, eps=None):
    return mu + (torch.randn_like(mu) if eps is None else eps) * (0.5 * logvar).exp()


def rsample_normal(device, rows, dtype):
    definition = lambda m, v, eps: reference.rsample_normal(m, v, eps=eps)  # noqa: E731
    return two(device, rows, dtype), *drawn(fastkl.rsample_normal, sample, definition, normals(device, rows, LATENT))


def rsample_kl(device, rows, dtype):
    eager = lambda m, v, eps=None: (sample(m, v, eps), kl_normal_eager(m, v))  # noqa: E731
    definition = lambda m, v, eps: reference.rsample_kl(m, v, eps=eps)  # noqa: E731
    return two(device, rows, dtype), *drawn(fastkl.rsample_kl, eager, definition, normals(device, rows, LATENT))


def rsample_kl_packed(device, rows, dtype):
    fused = lambda h, seed=None: fastkl.DiagonalNormal.from_packed(h).rsample_kl(seed=seed)  # noqa: E731
    eager = lambda h, eps=None: (sample(*h.chunk(2, 1), eps), kl_normal_eager(*h.chunk(2, 1)))  # noqa: E731
    definition = lambda h, eps: reference.rsample_kl(*h.chunk(2, 1), eps=eps)  # noqa: E731
    inputs = two(device, rows, dtype, 1, 2 * LATENT)
    return inputs, *drawn(fused, eager, definition, normals(device, rows, LATENT))


def gumbel_softmax(device, rows, dtype):
    fused = lambda x, seed=None: fastkl.gumbel_softmax(x, gumbel.TAU, seed=seed)  # noqa: E731
    shape = (rows, CLASSES)
    noise = functools.cache(lambda: reference.gumbel_noise(torch.tensor(SEED, device=device), shape))

    def eager(x, noise=None):
        return gumbel.formula(x) if noise is None else torch.softmax((x + noise) / gumbel.TAU, -1)

    return two(device, rows, dtype, 1, CLASSES), *drawn(fused, eager, gumbel.definition, noise)


# op -> (its constructor, key of bench/budget.py, elements of a row that forward moves)
STREAMS: dict[str, tuple[Callable, str, int]] = {
    "kl_normal": (kl_normal, "kl_normal", 2 * LATENT),
    "rsample_kl": (rsample_kl, "rsample_kl", 3 * LATENT),
    "rsample_normal": (rsample_normal, "rsample_normal", 3 * LATENT),
    "bernoulli_log_prob": (bernoulli_log_prob, "bernoulli_log_prob", 2 * PIXELS),
    "normal_log_prob": (normal_log_prob, "normal_log_prob", 3 * PIXELS),
    "gumbel_softmax": (gumbel_softmax, "gumbel_softmax", 2 * CLASSES),
    "kl_normal, packed": (kl_normal_packed, "packed", 2 * LATENT),
    "rsample_kl, packed": (rsample_kl_packed, "packed, drawn", 3 * LATENT),
    "kl_normal, prior": (kl_normal_prior, "kl_normal, prior", 4 * LATENT),
    "kl_normal_per_dim": (kl_normal_per_dim, "kl_normal_per_dim", 2 * LATENT),
    "wasserstein2_normal": (wasserstein2_normal, "wasserstein2_normal", 2 * LATENT),
}
FIRST = list(STREAMS)[:6]  # ops that are timed in bfloat16 too


COARSE = {"eager": 1e-3, "torch.compile": 1e-3}


def mixture(device: str, small: bool) -> Timed:
    n, k, d = (64, 10, 8) if small else (65536, 1024, 64)
    inputs = bench_gmm_log_prob.inputs(device, n, k, d)
    functions = {"fastkl": fastkl.gmm_log_prob}
    for precision in ("tf32x3", "tf32"):
        functions[f"fastkl {precision}"] = functools.partial(fastkl.gmm_log_prob, precision=precision)
    part = lambda at, rows, shared: reference.gmm_log_prob(*rows, *shared)  # noqa: E731
    settings = {"shared": 3, "block": max(1, 16 * SAFETY // (k * d)), "triples": n * k * d}
    allowed = COARSE | {"fastkl tf32x3": 1e-3, "fastkl tf32": 3e-2}
    return Timed(inputs, functions | {"eager": bench_gmm_log_prob.formula}, part, n, **settings, allowed=allowed)


def mmd(device: str, small: bool) -> Timed:
    n, d = (64, 8) if small else (16384, 64)
    x, y = leaves(device, (n, d), (n, d))
    y = (y.detach() + 1).requires_grad_()

    def part(at, rows, shared):
        def total(a, b):
            t = (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp_min(0) / (2 * d)
            return reference.mmd_kernel(t, "imq", reference.MMD_SCALES)

        def own(a):  # leaves out the pairs of a point with itself
            pairs = total(a[at], a)
            return (pairs.sum() - pairs[:, at].diagonal().sum()) / (n * (n - 1))

        x, y = shared
        return own(x) + own(y) - 2 * total(x[at], y).sum() / n**2

    pairs = n * (n - 1) + n * n  # each pair within a sample once, and all pairs between them
    functions = {"fastkl": fastkl.mmd, "eager": bench_mmd.formula}
    settings = {"shared": 2, "summed": True, "block": max(1, 8 * SAFETY // n), "triples": pairs * d}
    return Timed([x, y], functions, part, n, **settings, allowed=COARSE)


def total_correlation(device: str, small: bool) -> Timed:
    n, d = (64, 8) if small else (8192, 32)
    mu, logvar, eps = (tensor.detach() for tensor in leaves(device, *[(n, d)] * 3))
    logvar = logvar - 2
    inputs = [t.requires_grad_() for t in (mu + (0.5 * logvar).exp() * eps, mu, logvar)]
    size = bench_total_correlation.DATASET_SIZE

    def part(at, rows, shared):
        return reference.total_correlation(*rows, *shared, size, first=at.start)

    functions = {
        "fastkl": lambda *t: tuple(fastkl.total_correlation(*t, size)),
        "eager": lambda *t: tuple(bench_total_correlation.formula(*t)),
    }
    settings = {"shared": 2, "block": max(1, 16 * SAFETY // (n * d)), "triples": n * n * d}
    return Timed(inputs, functions, part, n, **settings, allowed=COARSE)


PAIRS = {"mixture": mixture, "mmd": mmd, "total_correlation": total_correlation}
REST = ("kl_gmm", "kl_gmm_bounds", "gmm_responsibilities", "gmm_moments", "mmd_normal", "rsample_gmm")
REST += ("sinkhorn_divergence", "sliced_wasserstein")


def jobs(small: bool) -> list[Job]:
    """All jobs, the most important first."""
    low, middle, high = (1, 1, 1) if small else (8, 34, 256)
    found = [Job(op, high, compile=True) for op in FIRST[:2]]
    found += [Job(op, 0, compile=True) for op in PAIRS]
    if small:  # one op of each kind
        return [*found, Job("kl_normal, packed", high), Job("gumbel_softmax", high, torch.bfloat16), Job(REST[0], 0)]
    found += [Job(op, high, compile=True) for op in FIRST[2:]]
    found += [Job(op, high, torch.bfloat16, True) for op in FIRST]
    found += [Job(op, mib, compile=True) for mib in (middle, low) for op in FIRST]
    found += [Job(op, high, compile=True) for op in STREAMS if op not in FIRST]
    found += [Job(op, 0, compile=True) for op in REST]
    return found + [Job(op, mib, compile=True) for mib in (middle, low) for op in STREAMS if op not in FIRST]


def build(job: Job, device: str, small: bool) -> tuple[str, Timed]:
    """(name of the case, the case)."""
    if job.op in PAIRS:
        timed = PAIRS[job.op](device, small)
        return " x ".join(map(str, size_of(timed))), timed
    if job.op in REST:
        case = next(iter(importlib.import_module(f"bench.bench_{job.op}").cases(device, small)))
        return case.name, Timed(case.inputs, {"fastkl": case.fastkl, "eager": case.eager}, None, 0, case=case)
    make, budget, width = STREAMS[job.op]
    rows = -(-job.mib * MIB // (16 if small else 1) // (width * job.dtype.itemsize))
    inputs, functions, part, settings = make(device, rows, job.dtype)
    block = max(1, SAFETY // inputs[0].shape[1])
    name = " x ".join(map(str, inputs[0].shape))
    return name, Timed(inputs, functions, part, rows, budget, block=block, **settings)


def size_of(timed: Timed) -> tuple[int, ...]:
    shape = tuple(timed.inputs[0].shape)
    return (*shape[:1], len(timed.inputs[1]), *shape[1:])
