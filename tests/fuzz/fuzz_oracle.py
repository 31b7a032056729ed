"""Independent formulas of every op, in float64, with autograd's gradients."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

LOG_2PI = math.log(2 * math.pi)


class _ExpMinusOneMinus(torch.autograd.Function):
    """exp(x) - 1 - x, in extended precision near 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        wide = x.detach().numpy().astype(np.longdouble)
        series = wide * wide / 2 * (1 + wide / 3 * (1 + wide / 4 * (1 + wide / 5 * (1 + wide / 6 * (1 + wide / 7)))))
        with np.errstate(over="ignore"):
            found = np.where(abs(wide) < 1e-2, series, np.expm1(wide) - wide)
        return torch.from_numpy(found.astype(np.float64)).reshape(x.shape).to(x.dtype) * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.expm1(ctx.saved_tensors[0])


excess = _ExpMinusOneMinus.apply


def to_logvar(parameter, scale="logvar", bounds=None):
    if scale == "softplus":
        low = parameter < -20
        body = F.softplus(parameter.masked_fill(low, 0.0), threshold=40).log()
        parameter = 2 * torch.where(low, parameter - parameter.clamp(max=-20).exp() / 2, body)
    else:
        parameter = {"logvar": lambda p: p, "log_std": lambda p: 2 * p, "std": lambda p: 2 * p.log()}[scale](parameter)
    if bounds is None:
        return parameter
    clamped = parameter.clamp(*bounds[:2])
    return clamped.detach() + (parameter - parameter.detach()) if hasattr(bounds, "low") else clamped


def kl_elements(mu, parameter, prior_mu=None, prior_logvar=None, *, scale="logvar", bounds=None):
    x, difference = to_logvar(parameter, scale, bounds), mu
    if prior_mu is not None:
        difference = mu - prior_mu
    if prior_logvar is not None:
        x, difference = x - prior_logvar, difference * torch.exp(-0.5 * prior_logvar)
    return 0.5 * (excess(x) + difference.square())


def last(values, ndim):
    return values.sum(tuple(range(-ndim, 0))) if ndim else values


def wasserstein2_elements(mu, parameter, prior_mu=None, prior_logvar=None, *, scale="logvar", bounds=None):
    half = 0.5 * to_logvar(parameter, scale, bounds)
    other = torch.zeros_like(half) if prior_logvar is None else 0.5 * prior_logvar
    half, other = torch.broadcast_tensors(half, other)
    close = (half - other).abs() < 0.5
    near = torch.expm1((half - other).masked_fill(~close, 0.0)) * torch.exp(other)
    apart = torch.where(close, near, torch.exp(half) - torch.exp(other))
    return (mu if prior_mu is None else mu - prior_mu).square() + apart.square()


def normal_terms(x, mean, logvar):
    return -0.5 * (LOG_2PI + logvar + ((x - mean) * torch.exp(-0.5 * logvar)).square())


def bernoulli_terms(x, logits):
    return x * logits - F.softplus(logits, threshold=40)


def entropy(logvar):
    return 0.5 * (LOG_2PI + 1 + logvar).sum(-1)


# ---- mixtures ----


def joint(z, logits, means, logvars=None, scale_tril=None, variance=None, form="point"):
    """The components' joint log-densities [..., K]; `variance` is the posterior's at z, for the other forms."""
    log_weights = logits - logits.logsumexp(-1, keepdim=True)  # of which the gradient is a difference
    difference = z.unsqueeze(-2) - means
    size = z.shape[-1]
    if scale_tril is not None:
        lower = scale_tril.tril()
        if form == "convolved":
            lower = torch.linalg.cholesky(lower @ lower.mT + torch.diag_embed(variance).unsqueeze(-3))
        lower = lower.expand(*difference.shape, size)
        white = torch.linalg.solve_triangular(lower, difference.unsqueeze(-1), upper=False).squeeze(-1)
        total = white.square().sum(-1) + 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if form == "expected":
            root = torch.linalg.solve_triangular(lower, torch.eye(size, dtype=z.dtype), upper=False)
            total = total + (root.square().sum(-2) * variance.unsqueeze(-2)).sum(-1)
        return log_weights - 0.5 * (total + size * LOG_2PI)
    spread = means.new_zeros(1, 1) if logvars is None else logvars
    if form == "convolved":
        spread = torch.logaddexp(spread, variance.log().unsqueeze(-2))
    terms = normal_terms(difference, torch.zeros_like(difference), spread)
    if form == "expected":
        terms = terms - 0.5 * variance.unsqueeze(-2) * torch.exp(-spread)
    return log_weights + terms.sum(-1)


def kl_gmm(mu, logvar, *mixture, method="mc", eps=None, entropy_form="closed", gradient="plain"):
    mu, logvar = torch.broadcast_tensors(mu, logvar)
    if method != "mc":
        form = {"upper": "expected", "lower": "convolved"}[method]
        return -entropy(logvar) - joint(mu, *mixture, variance=logvar.exp(), form=form).logsumexp(-1)
    return sampled_kl(mu, logvar, lambda z: joint(z, *mixture).logsumexp(-1), eps, entropy_form, gradient)


def sampled_kl(mu, logvar, log_prob, eps, entropy_form="closed", gradient="plain"):
    z = mu + torch.exp(0.5 * logvar) * eps
    cross = log_prob(z).mean(0)
    fixed = (mu.detach(), logvar.detach()) if gradient == "stl" else (mu, logvar)
    if gradient == "stl":
        log_q = normal_terms(z, *fixed).sum(-1).mean(0)
    else:  # (z - mu) / sigma is the noise, whatever mu and logvar are
        log_q = -0.5 * (LOG_2PI + logvar + eps.square()).sum(-1).mean(0)
    if entropy_form == "closed":
        log_q = -entropy(logvar).detach() + (log_q - log_q.detach())
    return log_q - cross


def moments(z, logits, means, logvars=None, scale_tril=None):
    found = joint(z, logits, means, logvars, scale_tril)
    weights = found.softmax(-1).flatten(0, -2)
    difference = (z.unsqueeze(-2) - means).flatten(0, -3)
    if scale_tril is None:
        second = torch.einsum("nk,nkd->kd", weights, difference.square())
    else:
        second = torch.einsum("nk,nki,nkj->kij", weights, difference, difference)
    first = torch.einsum("nk,nkd->kd", weights, difference)
    return [t.detach() for t in (found.logsumexp(-1), weights.sum(0), first, second)]


class _Softmax(torch.autograd.Function):
    """Softmax with its gradient computed from the rounded result, as for a soft sample, which saves only that."""

    @staticmethod
    def forward(ctx, x, dim, rounding, least):
        y, ctx.dim = torch.softmax(x, dim), dim
        kept = y + rounding * y.clamp(min=least)
        ctx.save_for_backward(kept / kept.sum(dim, keepdim=True))
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        dx = gradient * y
        return dx - y * dx.sum(ctx.dim, keepdim=True), None, None, None


def relaxed(perturbed, tau, dim=-1, rounding=0.0, least=0.0):
    return _Softmax.apply(perturbed / tau, dim, rounding, least)


# ---- batches ----


def weights_of(log_w, dim):
    return torch.exp(log_w - log_w.detach().amax(dim, keepdim=True))


def effective_sample_size(log_w, dim):
    w = weights_of(log_w, dim)
    return w.sum(dim).square() / w.square().sum(dim)


def weight_entropy(log_w, dim):
    w = weights_of(log_w, dim)
    v = w / w.sum(dim, keepdim=True)
    return -(v * v.masked_fill(v == 0, 1.0).log()).sum(dim)


def total_correlation(z, mu, logvar, dataset_size, weights):
    count = z.shape[0]
    mu, logvar = mu.expand(z.shape), logvar.expand(z.shape)
    others = count - 1
    matrix = torch.full((count, count), 1 / (dataset_size * count), dtype=z.dtype)
    if weights == "mss":
        matrix = torch.full((count, count), 1 / others, dtype=z.dtype)
        for row in range(count):
            matrix[row, row] = 1 / dataset_size
            matrix[row, (row + 1) % count] = (dataset_size - others) / (dataset_size * others)
    log_joint = (matrix.log() + normal_terms(z.unsqueeze(1), mu, logvar).sum(-1)).logsumexp(1)
    log_marginals = (matrix.log().unsqueeze(-1) + normal_terms(z.unsqueeze(1), mu, logvar)).logsumexp(1).sum(-1)
    own = normal_terms(z, mu, logvar).sum(-1)
    standard = normal_terms(z, torch.zeros_like(z), torch.zeros_like(z)).sum(-1)
    return own - log_joint, log_joint - log_marginals, log_marginals - standard


def mean_of_pairs(k, unbiased):
    n = k.shape[0]
    return (k * (1 - torch.eye(n, dtype=k.dtype))).sum() / (n * (n - 1)) if unbiased else k.mean()


def mmd(x, y, kernel, scales, unbiased):
    x, y = x.flatten(1), y.flatten(1)

    def k(a, b):
        t = (a.unsqueeze(1) - b).square().sum(-1) / (2 * a.shape[1])
        return sum(1 / (1 + t / s) if kernel == "imq" else torch.exp(-t / s) for s in scales)

    return mean_of_pairs(k(x, x), unbiased) + mean_of_pairs(k(y, y), unbiased) - 2 * k(x, y).mean()


def mmd_normal(mu, logvar, scales, unbiased):
    variance = torch.zeros_like(mu) if logvar is None else logvar.exp().expand(mu.shape)
    mu, variance = mu.flatten(1), variance.flatten(1)
    size = mu.shape[1]

    def k(u, v):
        return sum(
            torch.exp(-0.5 * (torch.log1p(v / (size * s)) + u.square() / (size * s + v)).sum(-1)) for s in scales
        )

    pairs = k(mu.unsqueeze(1) - mu, variance.unsqueeze(1) + variance)
    standard = sum(math.exp(-0.5 * size * math.log1p(2 / (size * s))) for s in scales)
    return mean_of_pairs(pairs, unbiased) - 2 * k(mu, variance + 1).mean() + standard


def sliced(x, y, unit, p):
    n, m = x.shape[0], y.shape[0]
    first = (x @ unit.T).sort(0).values.repeat_interleave(m, 0)
    second = (y @ unit.T).sort(0).values.repeat_interleave(n, 0)
    return (first - second).abs().pow(p).mean()


def matrix_of(scale, loc):
    return scale.tril() if scale.dim() > loc.dim() else torch.diag_embed(scale)


def kl_multivariate(loc_q, scale_q, loc_p, scale_p):
    lower_q, lower_p = matrix_of(scale_q, loc_q), matrix_of(scale_p, loc_p)
    shape = torch.broadcast_shapes(lower_q.shape, lower_p.shape)
    ratio = torch.linalg.solve_triangular(lower_p.expand(shape), lower_q.expand(shape), upper=False)
    difference = (loc_q - loc_p).unsqueeze(-1)
    batch = torch.broadcast_shapes(difference.shape[:-2], lower_p.shape[:-2])
    difference, lower = difference.expand(*batch, -1, 1), lower_p.expand(*batch, -1, -1)
    white = torch.linalg.solve_triangular(lower, difference, upper=False).squeeze(-1)
    diagonals = [t.diagonal(dim1=-2, dim2=-1) for t in (lower_q, lower_p)]
    x = 2 * (diagonals[0] / diagonals[1]).log()
    return 0.5 * (excess(x).sum(-1) + ratio.tril(-1).square().sum((-2, -1)) + white.square().sum(-1))


def wasserstein2_multivariate(loc_q, scale_q, loc_p, scale_p):
    lower_q, lower_p = matrix_of(scale_q, loc_q), matrix_of(scale_p, loc_p)
    both = [t.square().sum((-2, -1)) for t in (lower_q, lower_p)]
    fidelity = torch.linalg.svdvals(lower_p.mT @ lower_q).sum(-1)
    return (loc_q - loc_p).square().sum(-1) + both[0] + both[1] - 2 * fidelity
