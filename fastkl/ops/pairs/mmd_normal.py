"""Maximum mean discrepancy of samples, or of Gaussian posteriors, to N(0, I), without samples of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _group
from fastkl.ops._scales import as_logvar
from fastkl.ops.pairs import _mmd, _mmd_posteriors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup


def _terms(
    mu: Tensor, logvar: Tensor | None, scales: tuple[float, ...], group: ProcessGroup | None, rows: int
) -> Tensor:  # fmt: skip
    """reference.mmd_normal_terms, the mean over all processes' rows in float64; of points, from their norms alone."""
    size = mu.shape[1]
    spread = None if logvar is None else logvar.exp() + 1
    norms = mu.square().sum(1)
    total, constant = torch.zeros((), dtype=torch.float64, device=mu.device), 0.0
    for s in scales:
        g = size * s
        if spread is None:
            exponent = norms / (g + 1) + size * math.log1p(1 / g)
        else:
            exponent = (torch.log1p(spread / g) + mu.square() / (spread + g)).sum(1)
        constant += math.exp(-0.5 * size * math.log1p(2 / g))
        total = total + torch.exp(-0.5 * exponent).sum(dtype=torch.float64)
    return constant - 2 * _group.total(group, total) / rows


def mmd_normal(
    mu: Tensor, logvar: Tensor | float | None = None, *,
    scales: Sequence[float] = reference.MMD_SCALES, estimator: str = "unbiased", group: ProcessGroup | None = None,
    scale: str = "logvar",
) -> Tensor:  # fmt: skip
    """Squared maximum mean discrepancy (MMD) to N(0, I) under the RBF kernel, without samples of N(0, I): one number.

    MMD^2 = mean E k(z_i, z_j) - 2 mean E k(z_i, e) + E k(e, e'), e and e' from N(0, I), the z_i the points mu_i or,
    with logvar, independent draws from N(mu_i, diag exp(logvar_i)); k(z, z') = sum_s exp(-|z - z'|^2 / (2 D s)). With
    g = D s each expectation is, for every s, prod_d (g / (g + v))^(1/2) exp(-u^2 / (2 (g + v))), u and v the mean and
    the variance of the difference.

    `fastkl.mmd(z, e, kernel="rbf")` estimates the same, with the noise of e and z; here e is integrated out, and with
    logvar also z. The sweep over blocks of pairs needs no tensor of N x N elements.

    Args:
        mu: points, or means of posteriors, [N, D] or [N, *event].
        logvar: ln sigma^2 of the posteriors, broadcasts with mu, or a number; None: mu are points.
        scales: the s, each above 0.
        estimator: "unbiased" leaves out the pairs of a point with itself: an estimate for the distribution of the data,
            which can be below 0. "biased" keeps them: the squared MMD of the points' empirical distribution, or of the
            mixture of the N posteriors, never below 0.
        group: a torch.distributed process group; the rows are then those of all its processes, and every process gets
            the same value. None: this process's rows. Blocks of mu and logvar go around a ring, as in `fastkl.mmd`.
        scale: the meaning of logvar: "logvar", "log_std", "std" or "softplus" (sigma = softplus of it), as in
            `fastkl.kl_normal`. `scales` are those of the kernel.

    Returns:
        [], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients have each input's dtype.

    Raises:
        TypeError: mu or logvar is not a floating-point tensor, scales is not a sequence of numbers, group is not a
            process group.
        ValueError: shapes do not broadcast, devices differ, there are fewer than two rows (biased: one), estimator or
            scale is unknown, or scales is empty or has a number not above 0.
        RuntimeError: the gradient of a group's value is differentiated.

    Source: Rustamov 2019, "Closed-form Expressions for Maximum Mean Discrepancy with Applications to Wasserstein
    Auto-Encoders", arXiv:1901.03227; of points also Baringhaus and Henze 1988, "A consistent test for multivariate
    normality based on the empirical characteristic function", Metrika 35.

    >>> import torch, fastkl
    >>> mu, logvar = torch.zeros(3, 2), torch.zeros(3, 2)
    >>> fastkl.mmd_normal(mu, logvar).abs() < 1e-6  # the posteriors are the prior
    tensor(True)
    >>> fastkl.mmd_normal(mu, scales=[1.0])  # 1 - 2 (2/3) + 2/4
    tensor(0.1667)
    """
    (given,) = arguments.as_tensors(mu, logvar)
    arguments.check_tensors(mu=mu, **({} if given is None else {"logvar": given}))
    scales = _mmd.check_scales(scales)
    shape = arguments.broadcast_shape(mu=mu, logvar=given)
    arguments.check_choice("estimator", estimator, reference.MMD_ESTIMATORS)
    given = as_logvar("scale", given, scale, mu)
    dtype = reference.compute_dtype(mu, given)  # cast first: gradients of both parts are summed in this dtype
    tensors = [_mmd.check_points("mu", t.to(dtype).expand(shape)) for t in (mu, given) if t is not None]
    points, *logvars = tensors
    sizes = _group.row_counts(group, points.shape[0], points.device)
    unbiased = _mmd.check_estimator(estimator, mu=sum(sizes))
    if logvars:
        pairs = _mmd_posteriors.mean_kernel(points, logvars[0], scales, unbiased, group, sizes)
    else:
        pairs = _mmd.mmd(points, points[:0].detach(), "rbf", scales, unbiased, group, [sizes, [0] * len(sizes)])
    return (pairs + _terms(points, logvars[0] if logvars else None, scales, group, sum(sizes))).to(dtype)
