"""The RBF kernel between Gaussian posteriors, summed over their pairs, as a registered op with its gradient.

With w = exp(logvar_i) + exp(logvar_j), u = mu_i - mu_j and g = D s, the sum over i, j and s of

    K_s = prod_d r_d^(1/2) exp(-u_d^2 r_d / (2 g)),  r_d = 1 / (1 + w_d / g)

and, from the same sweep, its gradient: dK / dmu_i = -K u r / g and dK / dvariance_i = K (u^2 r^2 / g - r) / (2 g).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _group
from fastkl.ops._register import register, without_autocast
from fastkl.ops._sweep import Sweep
from fastkl.ops.pairs._pairs import blocks, fake, of_block, pair_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BLOCK = 256  # posteriors per block side: two sums per pair and scale fit the CPU cache
SMALL = 1 << 17  # up to this, pairs times dimensions are computed at once: a sweep has more call overhead


def _sweep(mu, logvar, scales, unbiased, dmu, dlogvar) -> list[Tensor]:
    """[mean of K over pairs in float64, its gradients in mu if dmu, in logvar if dlogvar]."""
    rows, size = mu.shape
    if rows * rows * size <= SMALL:
        return _at_once(mu, logvar, scales, unbiased, dmu, dlogvar)
    weight = pair_weights(rows, 0, unbiased)[0]
    parts = blocks(rows, BLOCK)
    pairs = [(a, b) for index, a in enumerate(parts) for b in parts[index:]]
    total, *found = _sums(mu, logvar, pairs, scales, unbiased, dmu or dlogvar)
    return [total * weight, *(weight * gradient for wanted, gradient in zip((dmu, dlogvar), found) if wanted)]


@without_autocast
@torch.no_grad()
def _between(mu, logvar, other_mu, other_logvar, scales, gradient) -> list[Tensor]:
    """[sum_ij K_ij in float64, its gradients in mu and logvar if `gradient`], i of the first two, j of the others."""
    n, m = len(mu), len(other_mu)
    pairs = [(a, b) for a in blocks(n, BLOCK) for b in blocks(m, BLOCK, first=n)]
    total, *found = _sums(
        torch.cat([mu, other_mu]), torch.cat([logvar, other_logvar]), pairs, scales, False, gradient, mirrored=False
    )
    return [total, *(0.5 * each[:n] for each in found)]


def _sums(
    mu: Tensor, logvar: Tensor, pairs: list[tuple[slice, slice]], scales: list[float], unbiased: bool, gradient: bool,
    mirrored: bool = True,
) -> list[Tensor]:  # fmt: skip
    """[sum of K in float64, its gradients in mu and logvar if `gradient`] over pairs of blocks. If `mirrored`, a pair
    (a, b) of two blocks counts for (b, a) too. If not, the gradients are those of a alone, of both orders."""
    dtype = reference.compute_dtype(mu, logvar)
    size = mu.shape[1]
    mean, variance = mu.to(dtype).T.contiguous(), logvar.to(dtype).exp().T.contiguous()
    scaled = [variance / (size * s) for s in scales]
    longest = max((part.stop - part.start for pair in pairs for part in pair), default=0)
    memory = mean.new_empty(2 * len(scales) + 6, longest * longest)
    total = mean.new_zeros((), dtype=torch.float64)
    dmean, dvariance = torch.zeros_like(mean), torch.zeros_like(mean)
    for a, b in pairs:
        tiles = [of_block(buffer, a, b) for buffer in memory]
        u, square, r, product, first, second = tiles[:6]
        quadratic, kernels = tiles[6 : 6 + len(scales)], tiles[6 + len(scales) :]
        for d in range(size):
            _difference(mean[d], a, b, u)
            torch.mul(u, u, out=square)
            for own, q, k in zip(scaled, quadratic, kernels):
                _ratio(own[d], a, b, r)
                k.mul_(r) if d else k.copy_(r)  # underflows only if the true value is negligible
                q.addcmul_(square, r) if d else torch.mul(square, r, out=q)
        for s, q, k in zip(scales, quadratic, kernels):
            k.sqrt_().mul_(q.mul_(-0.5 / (size * s)).exp_())
            if unbiased and a == b:
                k.fill_diagonal_(0.0)
            total += (2 if mirrored and a != b else 1) * k.sum(1).sum(dtype=torch.float64)
            k.mul_(1 / (size * s))
        for d in range(size) if gradient else ():
            _difference(mean[d], a, b, u)
            for position, (s, own, k) in enumerate(zip(scales, scaled, kernels)):
                _ratio(own[d], a, b, r)
                torch.mul(k, r, out=product)
                first.add_(product) if position else first.copy_(product)
                r.mul_(1 / (size * s))
                second.addcmul_(product, r) if position else torch.mul(product, r, out=second)
            # A pair counts for both orders, and a mirrored block for its transpose.
            torch.mul(u, first, out=product)
            dmean[d, a] -= 2 * product.sum(1)
            if mirrored and a != b:
                dmean[d, b] += 2 * product.sum(0)
            torch.mul(u, u, out=square)
            torch.mul(square, second, out=product).sub_(first)
            dvariance[d, a] += product.sum(1)
            if mirrored and a != b:
                dvariance[d, b] += product.sum(0)
    return [total, *([each.T.contiguous() for each in (dmean, dvariance.mul_(variance))] if gradient else [])]


def _difference(mean: Tensor, a: slice, b: slice, out: Tensor) -> Tensor:
    return torch.sub(mean[a].unsqueeze(1), mean[b], out=out)


def _ratio(scaled: Tensor, a: slice, b: slice, out: Tensor) -> Tensor:
    return torch.add(scaled[a].unsqueeze(1) + 1, scaled[b], out=out).reciprocal_()


def _parts(mu, logvar, scales, unbiased):
    """(u [N, N, D], variance [N, D], and per scale r [N, N, D] and the weighted K [N, N]), differentiable."""
    dtype = reference.compute_dtype(mu, logvar)
    mu, variance = mu.to(dtype), logvar.to(dtype).exp()
    rows, size = mu.shape
    u, w = mu.unsqueeze(1) - mu, variance.unsqueeze(1) + variance
    weights = torch.full((rows, rows), pair_weights(rows, 0, unbiased)[0], dtype=dtype, device=mu.device)
    weights = weights - torch.diag(weights.diagonal()) if unbiased else weights
    each = []
    for s in scales:
        r = 1 / (1 + w / (size * s))
        k = torch.exp(0.5 * (r.log() - u.square() * r / (size * s)).sum(-1))
        each.append((r, weights * k))
    return u, variance, each


def gradients(mu, logvar, scales, unbiased, *_wanted) -> list[Tensor]:
    """The gradients in mu and logvar, in differentiable torch ops; allocates [N, N, D]."""
    u, variance, each = _parts(mu, logvar, scales, unbiased)
    return _gradients(u, variance, each, scales)


def _gradients(u, variance, each, scales) -> list[Tensor]:
    dmu, dvariance = torch.zeros_like(variance), torch.zeros_like(variance)
    for s, (r, k) in zip(scales, each):
        g = u.shape[-1] * s
        weighted = k.unsqueeze(-1) * r / g
        dmu = dmu - 2 * (weighted * u).sum(1)
        dvariance = dvariance + (weighted * (u.square() * r / g - 1)).sum(1)
    return [dmu, dvariance * variance]


def _at_once(mu, logvar, scales, unbiased, dmu, dlogvar) -> list[Tensor]:
    """`_sweep` without blocks."""
    u, variance, each = _parts(mu, logvar, scales, unbiased)
    total = sum(k.sum(1).sum(dtype=torch.float64) for _, k in each)
    found = _gradients(u, variance, each, scales) if dmu or dlogvar else []
    return [total, *(gradient for wanted, gradient in zip((dmu, dlogvar), found) if wanted)]


def _kernels():
    from fastkl.kernels.pairs import mmd_normal

    return mmd_normal


def _loops():
    from fastkl.native import mmd_normal

    return mmd_normal


mmd_posteriors = register(
    "mmd_posteriors(Tensor mu, Tensor logvar, float[] scales, bool unbiased, bool dmu, bool dlogvar) -> Tensor[]",
    closed_form=_sweep,
    fake=fake,
    kernel=lambda: _kernels().fwd,
    native=lambda: _loops().mmd_posteriors,
)
between = register(
    "mmd_posteriors_between(Tensor mu, Tensor logvar, Tensor other_mu, Tensor other_logvar, float[] scales, "
    "bool gradient) -> Tensor[]",
    closed_form=_between,
    fake=lambda mu, logvar, other_mu, other_logvar, scales, gradient: fake(mu, logvar, *[gradient] * 2),
    kernel=lambda: _kernels().between,
)


@torch.no_grad()
def _own_rows(mu, logvar, scales, unbiased: bool, group, sizes: list[int], *wanted: bool) -> list[Tensor]:
    """[this process's rows' part of the mean kernel, the gradients of the whole in them]."""
    weight = pair_weights(sum(sizes), 0, unbiased)[0]
    total, gradient, pairs = mu.new_zeros((), dtype=torch.float64), any(wanted), len(mu) * (len(mu) - unbiased)
    sums = [total, torch.zeros_like(mu), torch.zeros_like(logvar)]
    for source, block in _group.ring(group, torch.cat([mu, logvar], 1), sizes):
        found, factors = [], [weight, 2 * weight, 2 * weight]  # gradients are those of the pair (j, i) too
        if source == torch.distributed.get_rank(group):
            if pairs:
                found, factors = mmd_posteriors(mu, logvar, scales, unbiased, gradient, gradient), [weight * pairs] * 3
        elif len(mu) and len(block):
            found = between(mu, logvar, *block.chunk(2, 1), scales, gradient)
        for sum_, each, factor in zip(sums, found, factors):
            sum_.add_(each, alpha=factor)
    return [total, *(each for each, want in zip(sums[1:], wanted) if want)]


OWN_ROWS = Sweep(_own_rows, once="mmd_normal with group= has no second derivative")
MMD_POSTERIORS = Sweep(mmd_posteriors, gradients, name="mmd_posteriors")


def mean_kernel(
    mu: Tensor, logvar: Tensor, scales: tuple[float, ...], unbiased: bool, group: ProcessGroup | None, sizes: list[int]
) -> Tensor:  # fmt: skip
    """The mean kernel over pairs of all rows of a group, in float64; `sizes` are the rows of its processes."""
    if len(sizes) > 1:
        return _group.total(group, OWN_ROWS.value([list(scales), unbiased, group, sizes], mu, logvar))
    return MMD_POSTERIORS.value([list(scales), unbiased], mu, logvar)
