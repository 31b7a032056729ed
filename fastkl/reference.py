"""Every op as plain, differentiable PyTorch: the definition.

Slow and clear. The kernels are tested against these functions in float64, and the arguments mean the same there.
Notation: q = N(mu, diag sigma^2), logvar = ln sigma^2, p the prior; everything is in nats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = ("logvar", "log_std", "std", "softplus")

# torch's softplus is the identity beyond a threshold; its default of 20 is visible in float64.
SOFTPLUS_THRESHOLD = 40.0


class SoftBounds(NamedTuple):
    """Bounds on the log-variance whose gradient lives outside them.

    The value is clamped exactly as with a plain tuple `(low, high)`. The gradient passes through the clamp
    (straight-through; Bengio et al. 2013, arXiv:1308.3432): it is taken at the bound, so a log-variance that has left
    the interval is pulled back by the loss instead of staying where it is for ever.

    >>> import torch, fastkl
    >>> logvar = torch.tensor([[50.0]], requires_grad=True)
    >>> fastkl.kl_normal(torch.zeros(1, 1), logvar, bounds=(-30, 20)).backward()
    >>> logvar.grad.item()
    0.0
    >>> logvar.grad = None
    >>> fastkl.kl_normal(torch.zeros(1, 1), logvar, bounds=fastkl.SoftBounds(-30, 20)).backward()
    >>> logvar.grad.item() > 1e8
    True
    """

    low: float
    high: float


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32: what every op computes and accumulates in."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def to_logvar(parameter: Tensor, scale: str = "logvar") -> Tensor:
    """The log-variance that a network's output stands for.

    `softplus` below -15 is exp(p) (1 - exp(p) / 2) to rounding; its logarithm is then taken in closed form, so that it
    does not underflow.
    """
    if scale == "logvar":
        return parameter
    if scale == "log_std":
        return 2 * parameter
    if scale == "std":
        return 2 * parameter.log()
    tail = parameter < -15
    log_softplus = F.softplus(parameter.masked_fill(tail, 0.0), threshold=SOFTPLUS_THRESHOLD).log()
    return 2 * torch.where(tail, parameter - 0.5 * parameter.clamp(max=-15).exp(), log_softplus)


def to_logvar_gradient(parameter: Tensor, scale: str) -> Tensor | float:
    """d logvar / d parameter."""
    if scale == "logvar":
        return 1.0
    if scale == "log_std":
        return 2.0
    if scale == "std":
        return 2 / parameter
    tail = parameter < -15
    body = parameter.masked_fill(tail, 0.0)
    ratio = torch.sigmoid(body) / F.softplus(body, threshold=SOFTPLUS_THRESHOLD)
    return 2 * torch.where(tail, 1 - 0.5 * parameter.clamp(max=-15).exp(), ratio)


def bound(logvar: Tensor, bounds: SoftBounds | tuple[float, float] | None) -> Tensor:
    """The clamped log-variance; with SoftBounds its gradient is that of the identity."""
    if bounds is None:
        return logvar
    clamped = logvar.clamp(bounds[0], bounds[1])
    if isinstance(bounds, SoftBounds):
        live = logvar.nan_to_num()  # inf - inf would not be 0
        return clamped.detach() + (live - live.detach())
    return clamped


def bound_gradient(dlogvar: Tensor, logvar: Tensor, bounds: SoftBounds | tuple[float, float] | None) -> Tensor:
    """The gradient in the log-variance before the clamp; NaN entries keep theirs."""
    if bounds is None or isinstance(bounds, SoftBounds):
        return dlogvar
    return dlogvar.masked_fill((logvar < bounds[0]) | (logvar > bounds[1]), 0.0)


def sum_event(values: Tensor, event_ndim: int) -> Tensor:
    return values.flatten(values.dim() - event_ndim).sum(-1)


# ---- Kullback-Leibler divergence of diagonal Gaussians --------------------------------------------------------------


def kl_terms(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None) -> Tensor:
    """exp(x) - 1 - x + (mu - prior_mu)^2 / prior_var with x = logvar - prior_logvar: twice the KL of each element.

    expm1(x) - x, never exp(x) - 1 - x: at x = 1e-4 the latter is 3.3 times too large in float32.
    """
    standard = mu if prior_mu is None else mu - prior_mu
    if prior_logvar is not None:
        # Half the exponent, so that a difference of 0 is 0 also where 1 / prior_var overflows.
        standard = standard * torch.exp(-0.5 * prior_logvar)
        logvar = logvar - prior_logvar
    return torch.expm1(logvar) - logvar + standard * standard


def kl_terms_gradient(mu, logvar, prior_mu=None, prior_logvar=None) -> tuple[Tensor, ...]:
    """d (1/2 kl_terms) / d (mu, logvar), and with a prior also / d (prior_mu, prior_logvar)."""
    if prior_mu is None:
        return mu, 0.5 * torch.expm1(logvar)
    root = torch.exp(-0.5 * prior_logvar)
    standard = (mu - prior_mu) * root
    dmu, dlogvar = standard * root, 0.5 * torch.expm1(logvar - prior_logvar)
    return dmu, dlogvar, -dmu, -dlogvar - 0.5 * standard * standard


def _kl_elements(mu, logvar, prior_mu, prior_logvar, scale, bounds) -> Tensor:
    dtype = compute_dtype(mu, logvar, prior_mu, prior_logvar)
    prior_mu = None if prior_mu is None else prior_mu.to(dtype)
    prior_logvar = None if prior_logvar is None else prior_logvar.to(dtype)
    logvar = bound(to_logvar(logvar.to(dtype), scale), bounds)
    mu, logvar = torch.broadcast_tensors(mu.to(dtype), logvar)
    return kl_terms(mu, logvar, prior_mu, prior_logvar)


def kl_normal(mu, logvar, prior_mu=None, prior_logvar=None, *, event_ndim=1, scale="logvar", bounds=None) -> Tensor:
    """KL(q || p), summed over the last `event_ndim` dimensions."""
    return 0.5 * sum_event(_kl_elements(mu, logvar, prior_mu, prior_logvar, scale, bounds), event_ndim)


def kl_normal_per_dim(
    mu, logvar, prior_mu=None, prior_logvar=None, *, event_ndim=1, scale="logvar", bounds=None
) -> Tensor:
    """KL(q || p) of each latent dimension, averaged over the batch."""
    values = 0.5 * _kl_elements(mu, logvar, prior_mu, prior_logvar, scale, bounds)
    return values.flatten(0, -event_ndim - 1).mean(0) if values.dim() > event_ndim else values


def kl_multivariate_normal(loc_q, scale_tril_q, loc_p, scale_tril_p) -> Tensor:
    """1/2 [tr(S_p^-1 S_q) + (m_p - m_q)^T S_p^-1 (m_p - m_q) - D + ln det S_p / det S_q], S = L L^T.

    A scale with no more dimensions than its own loc is a diagonal.
    """
    dtype = compute_dtype(loc_q, scale_tril_q, loc_p, scale_tril_p)
    covariances = []
    for loc, scale in ((loc_q, scale_tril_q), (loc_p, scale_tril_p)):
        matrix = (scale.tril() if scale.dim() > loc.dim() else torch.diag_embed(scale)).to(dtype)
        covariances.append(matrix @ matrix.mT)
    precision_p = torch.linalg.inv(covariances[1])
    difference = (loc_p.to(dtype) - loc_q.to(dtype)).unsqueeze(-1)
    trace = (precision_p @ covariances[0]).diagonal(dim1=-2, dim2=-1).sum(-1)
    mahalanobis = (difference.mT @ precision_p @ difference).squeeze(-1).squeeze(-1)
    log_determinants = torch.linalg.slogdet(covariances[1])[1] - torch.linalg.slogdet(covariances[0])[1]
    return 0.5 * (trace + mahalanobis - loc_q.shape[-1] + log_determinants)


# ---- Sampling -------------------------------------------------------------------------------------------------------


def philox(seed: Tensor, low: Tensor, high: Tensor, sample: Tensor | int, rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in int64 that hold 32-bit words.

    The counter is (low, high, sample, 0), the key is the seed's two halves.
    """
    mask = 0xFFFFFFFF
    key_0, key_1 = seed & mask, (seed >> 32) & mask
    word_0, word_1, word_2, word_3 = low, high, torch.zeros_like(low) + sample, torch.zeros_like(low)
    for _ in range(rounds):
        # int64 wraps, and the bits of the product are right all the same.
        product_0, product_2 = word_0 * 0xD2511F53, word_2 * 0xCD9E8D57
        word_0 = (product_2 >> 32) & mask ^ word_1 ^ key_0
        word_1 = product_2 & mask
        word_2 = (product_0 >> 32) & mask ^ word_3 ^ key_1
        word_3 = product_0 & mask
        key_0, key_1 = (key_0 + 0x9E3779B9) & mask, (key_1 + 0xBB67AE85) & mask
    return word_0, word_1, word_2, word_3


def box_muller(word_0: Tensor, word_1: Tensor) -> tuple[Tensor, Tensor]:
    """Two 32-bit words -> two independent float32 standard normals.

    The radius takes (w + 1/2) / 2^32, which is never 0 (so |eps| < 6.8); the angle is 2 pi w / 2^32.
    """
    radius = (-2.0 * torch.log(word_0.float() * 2.0**-32 + 2.0**-33)).sqrt()
    signed = word_1 - ((word_1 >> 31) << 32)  # the same angle in [-pi, pi), where float32 is finer
    angle = signed.float() * (2.0 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def normal_noise(
    seed: Tensor, shape: torch.Size | tuple[int, ...], num_samples: int | None = None, first_sample: int = 0
) -> Tensor:
    """The noise that `seed` stands for, the same on every device: float32, [*shape] or [num_samples, *shape].

    Element i of a sample, counted in row-major order, is normal i % 4 of the Philox counter (i // 4, sample).
    """
    count = math.prod(shape)
    group = torch.arange((count + 3) // 4, device=seed.device)
    samples = []
    for sample in range(first_sample, first_sample + (1 if num_samples is None else num_samples)):
        words = philox(seed, group & 0xFFFFFFFF, group >> 32, sample)
        normals = [*box_muller(words[0], words[1]), *box_muller(words[2], words[3])]
        samples.append(torch.stack(normals, dim=-1).flatten()[:count].reshape(shape))
    if num_samples is None:
        return samples[0]
    return torch.stack(samples) if samples else torch.empty((0, *shape), device=seed.device)


def rsample_normal(mu, logvar, *, num_samples=None, seed=None, eps=None, scale="logvar", bounds=None) -> Tensor:
    """mu + sigma eps, in the parameters' dtype; float64 noise has float32's 2^24 values."""
    dtype, out_dtype = compute_dtype(mu, logvar), torch.promote_types(mu.dtype, logvar.dtype)
    logvar = bound(to_logvar(logvar.to(dtype), scale), bounds)
    shape = torch.broadcast_shapes(mu.shape, logvar.shape)
    if eps is None:
        eps = normal_noise(seed, shape, num_samples)
    return (mu.to(dtype) + torch.exp(0.5 * logvar) * eps.to(dtype)).to(out_dtype)


def rsample_kl(
    mu, logvar, prior_mu=None, prior_logvar=None, *, event_ndim=1, num_samples=None, seed=None, eps=None,
    scale="logvar", bounds=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rsample_normal, kl_normal)."""
    z = rsample_normal(mu, logvar, num_samples=num_samples, seed=seed, eps=eps, scale=scale, bounds=bounds)
    return z, kl_normal(mu, logvar, prior_mu, prior_logvar, event_ndim=event_ndim, scale=scale, bounds=bounds)


# ---- Log-likelihoods ------------------------------------------------------------------------------------------------


def bernoulli_log_prob(logits, x, *, event_ndim=None) -> Tensor:
    """x ln sigmoid(logits) + (1 - x) ln sigmoid(-logits) = x logits - softplus(logits), summed over the event."""
    dtype = compute_dtype(logits, x)
    logits, x = torch.broadcast_tensors(logits.to(dtype), x.to(dtype))
    values = x * logits - F.softplus(logits, threshold=SOFTPLUS_THRESHOLD)
    return sum_event(values, logits.dim() - 1 if event_ndim is None else event_ndim)


def bernoulli_terms_gradient(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """d (x logits - softplus(logits)) / d (logits, x)."""
    return x - torch.sigmoid(logits), logits


def normal_log_prob(x, mean, logvar, *, event_ndim=None) -> Tensor:
    """-1/2 [ln 2 pi + logvar + z^2] with z = (x - mean) exp(-logvar / 2), summed over the event."""
    dtype = compute_dtype(x, mean, logvar)
    x, mean, logvar = torch.broadcast_tensors(x.to(dtype), mean.to(dtype), logvar.to(dtype))
    z = (x - mean) * torch.exp(-0.5 * logvar)  # squared last: 1 / sigma^2 alone overflows first
    return sum_event(-0.5 * (math.log(2 * math.pi) + logvar + z * z), x.dim() - 1 if event_ndim is None else event_ndim)


def normal_terms_gradient(x: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """d ln N(x; mean, exp(logvar)) / d (mean, logvar); d / d x = -d / d mean."""
    precision_root = torch.exp(-0.5 * logvar)
    z = (x - mean) * precision_root
    return z * precision_root, 0.5 * (z * z - 1)


# ---- Gaussian mixtures ----------------------------------------------------------------------------------------------


def gmm_joint_log_prob(
    z, logits, means, logvars=None, *, scale_tril=None, logvar=None, form="point"
) -> Tensor:  # fmt: skip
    """ln pi_k + (what `form` says about component k at z), [..., K]; pi = softmax(logits).

    With q = N(z, diag exp(logvar)): "point" is ln N(z; m_k, S_k); "expected" is E_q[ln N(.; m_k, S_k)]; "convolved" is
    ln E_q[N(.; m_k, S_k)] = ln N(z; m_k, S_k + exp(logvar)). z is [..., D], means [..., K, D]; logvars broadcasts with
    means, absent it is 0; scale_tril is [..., K, D, D], and its part above the diagonal is not read.
    """
    dtype = compute_dtype(z, logits, means, logvars, scale_tril, logvar)
    log_weights = torch.log_softmax(logits.to(dtype), -1)
    difference = z.to(dtype).unsqueeze(-2) - means.to(dtype)
    variance = None if logvar is None else logvar.to(dtype).exp().unsqueeze(-2)
    if scale_tril is not None:
        scale = scale_tril.to(dtype).tril()
        if form == "convolved":
            covariance = scale @ scale.mT + torch.diag_embed(variance.expand(difference.shape))
            scale = torch.linalg.cholesky(covariance)
        log_determinant = 2 * scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        scale = scale.expand(*difference.shape, difference.shape[-1])
        whitened = torch.linalg.solve_triangular(scale, difference.unsqueeze(-1), upper=False).squeeze(-1)
        quadratic = whitened.square().sum(-1)
        if form == "expected":
            precision_root = torch.linalg.solve_triangular(scale, torch.eye(scale.shape[-1]).to(scale), upper=False)
            quadratic = quadratic + (precision_root.square().sum(-2) * variance).sum(-1)
    else:
        logvars = means.new_zeros(()) if logvars is None else logvars
        spread = logvars.to(dtype).expand(torch.broadcast_shapes(logvars.shape, means.shape))
        if form == "convolved":
            spread = torch.log(spread.exp() + variance)
        root = torch.exp(-0.5 * spread)
        quadratic = (difference * root).square().sum(-1)
        if form == "expected":
            quadratic = quadratic + (variance * root.square()).sum(-1)
        log_determinant = spread.sum(-1)
    constant = z.shape[-1] * math.log(2 * math.pi)
    return log_weights - 0.5 * (quadratic + log_determinant + constant)


def gmm_log_prob(z, logits, means, logvars=None, *, scale_tril=None) -> Tensor:
    """ln p(z) = logsumexp_k [ln pi_k + ln N(z; m_k, S_k)]."""
    return gmm_joint_log_prob(z, logits, means, logvars, scale_tril=scale_tril).logsumexp(-1)


def gmm_responsibilities(z, logits, means, logvars=None, *, scale_tril=None) -> Tensor:
    """ln p(k | z) = ln pi_k + ln N(z; m_k, S_k) - ln p(z)."""
    return gmm_joint_log_prob(z, logits, means, logvars, scale_tril=scale_tril).log_softmax(-1)


def normal_entropy(logvar) -> Tensor:
    """H(N(., diag exp(logvar))) = 1/2 sum_d [logvar_d + ln 2 pi e]."""
    return 0.5 * (logvar.to(compute_dtype(logvar)) + math.log(2 * math.pi * math.e)).sum(-1)


def kl_gmm(
    mu, logvar, logits, means, logvars=None, *, scale_tril=None, method="mc", num_samples=1, entropy="closed",
    gradient="plain", seed=None,
) -> Tensor:  # fmt: skip
    """KL(q || mixture): by samples ("mc"), or a bound from above ("upper") or below ("lower").

    gradient="stl" leaves out the gradient of ln q(z; mu, logvar) in mu and logvar at fixed z.
    """
    mu, logvar = torch.broadcast_tensors(mu, logvar)
    if method != "mc":
        form = {"upper": "expected", "lower": "convolved"}[method]
        joint = gmm_joint_log_prob(mu, logits, means, logvars, scale_tril=scale_tril, logvar=logvar, form=form)
        return -normal_entropy(logvar) - joint.logsumexp(-1)
    dtype = compute_dtype(mu, logvar, logits, means, logvars, scale_tril)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    eps = normal_noise(seed, mu.shape, num_samples).to(dtype)
    z = mu + torch.exp(0.5 * logvar) * eps
    cross = gmm_log_prob(z, logits, means, logvars, scale_tril=scale_tril).mean(0)
    fixed_mu, fixed_logvar = (mu.detach(), logvar.detach()) if gradient == "stl" else (mu, logvar)
    log_q = normal_log_prob(z, fixed_mu, fixed_logvar, event_ndim=1).mean(0)
    if entropy == "closed":  # this value, with the gradient of log_q, which for "plain" is the same
        log_q = -normal_entropy(logvar).detach() + (log_q - log_q.detach())
    return log_q - cross


def gumbel_noise(seed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """-ln(-ln u), u = (w + 1/2) / 2^32 with w the Philox word i % 4 of the counter (i // 4, 0); float32.

    u is taken as (w + 1/2) 2^-32 in float32 below 1/2, and -ln u by ln(1 - v), v = (2^32 - 1 - w + 1/2) 2^-32, above:
    both tails keep their relative precision, and the noise is finite always.
    """
    count = math.prod(shape)
    group = torch.arange((count + 3) // 4, device=seed.device)
    word = torch.stack(philox(seed, group & 0xFFFFFFFF, group >> 32, 0), -1).flatten()[:count].reshape(shape)
    low = word < 2**31
    u = word.float() * 2.0**-32 + 2.0**-33
    v = (0xFFFFFFFF - word).float() * 2.0**-32 + 2.0**-33
    return -torch.log(torch.where(low, -torch.log(u), -torch.log1p(-v)))


def relaxed_one_hot(perturbed, tau, hard=False, dim=-1) -> Tensor:
    """softmax(perturbed / tau); at tau = 0 its limit, one-hot at the first maximum, with gradient 0.

    With `hard` the value is one-hot and the gradient that of the softmax. Entries of -inf weigh 0, also where all are;
    they leave no NaN in any gradient. A tau below 0 or NaN gives NaN.
    """
    dtype, infinity = perturbed.dtype, float("inf")
    tau = torch.as_tensor(tau, dtype=dtype, device=perturbed.device)
    masked = perturbed == -infinity
    top = perturbed.detach().amax(dim, keepdim=True)
    shifted = (perturbed - top.masked_fill(top == -infinity, 0.0)).masked_fill(masked, 0.0)
    positive = torch.where(tau > 0, tau.clamp(min=torch.finfo(dtype).tiny), torch.where(tau == 0, 1.0, math.nan))
    weights = torch.exp(shifted / positive).masked_fill(masked, 0.0)
    total = weights.sum(dim, keepdim=True)
    soft = weights / total.masked_fill(total == 0, 1.0)
    one_hot = torch.zeros_like(perturbed).scatter(dim, perturbed.argmax(dim, keepdim=True), 1.0)
    one_hot = one_hot.masked_fill(total == 0, 0.0).masked_fill(total.isnan(), math.nan)
    soft = torch.where(tau == 0, one_hot, soft)
    return one_hot + (soft - soft.detach()) if hard else soft


def gumbel_softmax(logits, tau=1.0, hard=False, dim=-1, *, seed) -> Tensor:
    """relaxed_one_hot(logits + g, tau, hard) with g standard Gumbel noise, in the logits' dtype."""
    noise = gumbel_noise(seed, logits.shape)
    return relaxed_one_hot(logits.to(compute_dtype(logits)) + noise, tau, hard, dim).to(logits.dtype)
