"""The calls of the smoke test: every public op, in variants that take different paths through a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastkl

SEED = 5
FEW = ("gmm_log_prob", "kl_normal", "rsample_kl packed", "gumbel_softmax")  # for small runs: one call per kind


class Call(NamedTuple):
    """A function, and the shapes of its standard normal arguments."""

    function: Callable
    shapes: list[tuple[int, ...]]
    waits: bool = False  # whether it is documented to read a value on the host


def elementwise(n: int, d: int) -> dict[str, Call]:
    """Ops on rows of n x d tensors."""
    two, four, shared = [(n, d)] * 2, [(n, d)] * 4, [(n, d), (n, d), (d,), (d,)]
    bounded = {"scale": "softplus", "bounds": (-9.0, 9.0)}
    return {
        "kl_normal": Call(fastkl.kl_normal, two),
        "kl_normal bounds": Call(lambda *t: fastkl.kl_normal(*t, **bounded), two),
        "kl_normal prior": Call(fastkl.kl_normal, four),
        "kl_normal shared prior": Call(fastkl.kl_normal, shared),
        "kl_normal packed": Call(lambda h: fastkl.DiagonalNormal.from_packed(h).kl(), [(n, 2 * d)]),
        "kl_normal_per_dim": Call(fastkl.kl_normal_per_dim, two),
        "wasserstein2_normal": Call(fastkl.wasserstein2_normal, two),
        "rsample_normal": Call(lambda *t: fastkl.rsample_normal(*t, seed=SEED), two),
        "rsample_normal samples": Call(lambda *t: fastkl.rsample_normal(*t, seed=SEED, num_samples=3), two),
        "rsample_kl": Call(lambda *t: fastkl.rsample_kl(*t, seed=SEED), two),
        "rsample_kl shared prior": Call(lambda *t: fastkl.rsample_kl(*t, seed=SEED), shared),
        "rsample_kl own noise": Call(lambda m, v, e: fastkl.rsample_kl(m, v, eps=e), [(n, d)] * 3),
        "rsample_kl packed": Call(
            lambda h: fastkl.DiagonalNormal.from_packed(h).rsample_kl(seed=SEED), [(n, 2 * d)]
        ),
        "bernoulli_log_prob": Call(lambda *t: fastkl.bernoulli_log_prob(*t, event_ndim=1), two),
        "normal_log_prob": Call(lambda *t: fastkl.normal_log_prob(*t, event_ndim=1), [(n, d)] * 3),
        "gumbel_softmax": Call(lambda x: fastkl.gumbel_softmax(x, 0.7, seed=SEED), [(n, d)]),
        "gumbel_softmax hard": Call(lambda x: fastkl.gumbel_softmax(x, 0.7, hard=True, seed=SEED), [(n, d)]),
        "gumbel_softmax tau": Call(lambda x, t: fastkl.gumbel_softmax(x, tau(t), seed=SEED), [(n, d), (2,)]),
        "gumbel_softmax tau hard": Call(
            lambda x, t: fastkl.gumbel_softmax(x, tau(t), hard=True, seed=SEED), [(n, d), (2,)]
        ),
    }  # fmt: skip


def tau(t: Tensor) -> Tensor:
    """A learned temperature."""
    return 0.5 + t.float().square().mean()


def tril(a: Tensor) -> Tensor:
    """A well-conditioned lower triangle of `a`."""
    return 0.3 * a.tril(-1) + torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)


def pairs(n: int, k: int, d: int) -> dict[str, Call]:
    """Ops on n points of d dimensions and k components, or on pairs of points."""
    mixture, two = [(k,), (k, d), (k, d)], [(n, d), (n, d)]
    cholesky = [(n, d), (n, d, d), (n, d), (n, d)]
    return {
        "gmm_log_prob": Call(fastkl.gmm_log_prob, [(n, d), *mixture]),
        "gmm_log_prob spherical": Call(fastkl.gmm_log_prob, [(n, d), (k,), (k, d), (k, 1)]),
        "gmm_log_prob tf32x3": Call(lambda *t: fastkl.gmm_log_prob(*t, precision="tf32x3"), [(n, d), *mixture]),
        "gmm_log_prob per datum": Call(fastkl.gmm_log_prob, [(2, n, d), (n, k), (n, k, d), (n, k, 1)]),
        "gmm_log_prob scale_tril": Call(
            lambda z, logits, means, a: fastkl.gmm_log_prob(z, logits, means, scale_tril=tril(a)),
            [(n, d), (k,), (k, d), (k, d, d)],
        ),
        "gmm_responsibilities": Call(fastkl.gmm_responsibilities, [(n, d), (n, k), (k, d), (1, d)]),
        "gmm_moments": Call(lambda *t: fastkl.gmm_moments(*t)[1], [(n, d), (k,), (k, d)]),
        "kl_gmm": Call(lambda *t: fastkl.kl_gmm(*t, num_samples=2, seed=SEED), [*two, *mixture]),
        "kl_gmm stl": Call(
            lambda *t: fastkl.kl_gmm(*t, num_samples=2, seed=SEED, gradient="stl"), [*two, *mixture]
        ),
        "kl_gmm upper": Call(lambda *t: fastkl.kl_gmm(*t, method="upper"), [*two, *mixture]),
        "kl_gmm_bounds": Call(fastkl.kl_gmm_bounds, [*two, *mixture]),
        "kl_gmm_bounds per datum": Call(fastkl.kl_gmm_bounds, [*two, (n, k), (k, d), (k, 1)]),
        "rsample_gmm": Call(lambda *t: fastkl.rsample_gmm(*t, tau=0.7, seed=SEED), [(n, k), (k, d), (k, d)]),
        "sample_gmm": Call(lambda *t: fastkl.sample_gmm(*t, num_samples=5, seed=SEED)[0], [(k,), (k, d)]),
        "mmd": Call(fastkl.mmd, [(n, d), (n // 2, d)]),
        "mmd rbf biased": Call(lambda *t: fastkl.mmd(*t, kernel="rbf", estimator="biased"), two),
        "mmd_normal": Call(fastkl.mmd_normal, two),
        "total_correlation": Call(lambda *t: fastkl.total_correlation(*t, 5000), [(n, d)] * 3),
        "total_correlation mws": Call(lambda *t: fastkl.total_correlation(*t, 5000, weights="mws"), [(n, d)] * 3),
        "sliced_wasserstein": Call(lambda *t: fastkl.sliced_wasserstein(*t, 20, seed=SEED), two),
        "sliced_wasserstein sizes": Call(
            lambda *t: fastkl.sliced_wasserstein(*t, 20, seed=SEED), [(n, d), (n // 3, d)]
        ),
        "sinkhorn_divergence": Call(lambda *t: fastkl.sinkhorn_divergence(*t, diameter=9.0), two),
        "iwae": Call(fastkl.iwae, [(8, n)]),
        "effective_sample_size": Call(fastkl.effective_sample_size, [(8, n)]),
        "weight_entropy": Call(fastkl.weight_entropy, [(8, n)]),
        "kl_multivariate_normal": Call(
            lambda m, a, p, b: fastkl.kl_multivariate_normal(m, tril(a), p, b.exp()), cholesky
        ),
        "wasserstein2_multivariate_normal": Call(
            lambda m, a, p, b: fastkl.wasserstein2_multivariate_normal(m, tril(a), p, b.exp()), cholesky, waits=True
        ),
    }  # fmt: skip


def calls(small: bool) -> dict[str, Call]:
    """Every call by its name and size, those with the longest compilation first."""
    n, k, d = (6, 3, 4) if small else (300, 50, 20)
    found = {f"{name} {n}x{k}x{d}": call for name, call in pairs(n, k, d).items()}
    # Rows that allow 16-byte loads, rows that do not, and long rows that are split over programs.
    for rows, columns in [(5, 7)] if small else [(257, 512), (37, 37), (3, 20000)]:
        found |= {f"{name} {rows}x{columns}": call for name, call in elementwise(rows, columns).items()}
    return {name: call for name, call in found.items() if not small or name.rpartition(" ")[0] in FEW}
