"""KL divergence from a diagonal Gaussian to a Gaussian mixture: by samples, or one of its bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._call import apply
from fastkl.ops._sampling import Seed
from fastkl.ops._scales import as_logvar
from fastkl.ops._sharding import by_parts
from fastkl.ops.mixture import _components as components
from fastkl.ops.mixture._canonical import PRECISIONS, as_logvars, batch_shape, canonical, check_shapes
from fastkl.ops.mixture._kl_samples import KLSamples
from fastkl.ops.mixture.gmm_log_prob import density, nothing

METHODS = {"mc": "point", "upper": "expected", "lower": "convolved"}


def bound(
    mu, logvar, logits, means, logvars, scale_tril, form: str, precision: str, groups: components.Groups
) -> Tensor:  # fmt: skip
    """-H(q) - logsumexp_k [ln pi_k + the term `form` of component k]."""
    logvar = logvar.to(reference.compute_dtype(logvar))  # cast first: gradients of both parts are summed in this dtype
    log_prob = density({"mu": mu, "logvar": logvar}, logits, means, logvars, scale_tril, form, precision, groups)
    log_q = -reference.normal_entropy(logvar, log_prob.dtype).expand(log_prob.shape)
    return components.once(log_q, groups) - log_prob


def _by_noise(
    mu, logvar, mixture, seed, eps, num_samples: int, entropy: str, stl: bool, precision: str,
    groups: components.Groups,
) -> Tensor:  # fmt: skip
    """ "mc" with noise in memory, which has the size of the samples: given, or because the components are sharded."""
    check_shapes({"mu": mu, "logvar": logvar}, *mixture)
    shape = torch.Size((*batch_shape({"mu": mu, "logvar": logvar}, *mixture), mu.shape[-1]))
    seed, eps = sampling.check_noise(seed, eps, num_samples, shape, mu.device)
    eps = sampling.draw(shape, eps, seed, num_samples)
    dtype = reference.compute_dtype(mu, logvar, *mixture)
    mu, logvar = (arguments.expand(tensor.to(dtype), shape) for tensor in (mu, logvar))
    eps = eps.to(dtype)
    z = mu + torch.exp(0.5 * logvar) * eps
    logits, means, logvars, scale_tril = mixture
    cross = density({"z": z}, logits, means, logvars, scale_tril, "point", precision, groups).mean(0)
    log_q = -reference.normal_entropy(logvar)
    if entropy == "sampled":
        log_q = log_q - 0.5 * (eps.square() - 1).sum(-1).mean(0)
    if stl:
        through_z = reference.normal_log_prob(z, mu.detach(), logvar.detach(), event_ndim=1).mean(0)
        log_q = log_q.detach() + (through_z - through_z.detach())
    return components.once(log_q, groups) - cross


@by_parts
def kl_gmm(
    mu: Tensor, logvar: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | float | None = None, *,
    scale_tril: Tensor | None = None, scale: str = "logvar", prior_scale: str = "logvar", method: str = "mc",
    num_samples: int = 1, entropy: str = "closed", gradient: str = "plain", seed: Seed | None = None,
    eps: Tensor | None = None, precision: str = "exact", _groups: components.Groups = (),
) -> Tensor:  # fmt: skip
    """KL divergence from a diagonal Gaussian q to a Gaussian mixture p, in nats, one value per sample.

    "mc":    E_q[ln q] - 1/L sum_l ln p(z_l), z_l = mu + exp(logvar / 2) eps_l
    "upper": -logsumexp_k [ln pi_k - KL(q || N_k)]
    "lower": -H(q) - logsumexp_k [ln pi_k + ln N(mu; m_k, S_k + diag exp(logvar))], the product bound

    Args:
        mu, logvar: mean and log-variance of q (or another parameter, see `scale`), [*batch, D].
        logits, means, logvars, scale_tril, precision: the mixture, as for `fastkl.gmm_log_prob`.
        scale, prior_scale: the meaning of logvar and of logvars: "logvar", "log_std", "std" or "softplus", as for
            `fastkl.kl_normal`; others than "logvar" are converted in float32.
        method: "mc" is unbiased; "upper" and "lower" are bounds without noise.
        num_samples: L of "mc". Memory does not depend on it: the noise is drawn again in the backward pass.
        entropy: E_q[ln q] of "mc" in "closed" form, or "sampled" at the same z_l, which is exact for every sample if
            q = p. Both have the same gradient: that of ln q(z_l) in mu and logvar is (0, -1/2) for any eps.
        gradient: "plain", or "stl" (sticking the landing): the gradient of ln q only through z_l, without a term of
            mean 0. For q = p it vanishes for every sample, not only on average.
        seed: an int, an int64 tensor or (seed, rank) for "mc", as for `fastkl.rsample_kl`. Sample l is
            `fastkl.rsample_normal(mu, logvar, num_samples=L, seed=seed)[l]`, mu expanded to the result's batch.
        eps: noise for "mc" instead of a seed, [num_samples, *batch, D] (quasi-Monte-Carlo, exact comparisons); it may
            require a gradient.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. mu, logvar and every
        parameter of the mixture have gradients. On a GPU, in float32, log-variances of components that all rows share
        are clamped to at least -120 in "upper", and those of all components to at least -87 in "lower", where variances
        of q below e^-87 count as 0; it is NaN if a log-variance is above 88.

    With DTensors whose components are sharded over R processes, each sends, for N rows, 8 (R - 1) (N L + 1) bytes
    forward (L = 1 for a bound) and, if they require gradients, 2 (R - 1) / R times the bytes of mu and logvar backward.
    "mc" then has the L samples in memory.

    Raises:
        TypeError: an argument is not a floating-point tensor, or num_samples or seed is not an int.
        ValueError: shapes do not match, devices differ, logvars and scale_tril are both given, method, scale, entropy,
            gradient or precision is unknown, num_samples < 1, seed and eps are both given, or eps has another shape.

    Source: Hershey and Olsen 2007, "Approximating the Kullback Leibler divergence between Gaussian mixture models",
    the variational bound (section 7, with one component on the left) and the product of Gaussians (section 5); Roeder
    et al. 2017, "Sticking the Landing", arXiv:1703.09194.

    >>> import torch, fastkl
    >>> mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
    >>> logits, means = torch.zeros(4), torch.zeros(4, 3)  # four equal components: one standard normal, which q is
    >>> fastkl.kl_gmm(mu, logvar, logits, means, method="upper").abs() < 1e-6
    tensor([True, True])
    """
    form = METHODS[arguments.check_choice("method", method, METHODS)]
    arguments.check_choice("entropy", entropy, ("closed", "sampled"))
    stl = arguments.check_choice("gradient", gradient, ("plain", "stl")) == "stl"
    num_samples = arguments.check_int("num_samples", num_samples, 1)
    arguments.check_choice("precision", precision, PRECISIONS)
    arguments.check_tensors(mu=mu, logvar=logvar, eps=eps)
    logvar = as_logvar("scale", logvar, scale, mu)
    logvars = as_logvars(means, logvars, prior_scale, "prior_scale")
    if method != "mc":
        return bound(mu, logvar, logits, means, logvars, scale_tril, form, precision, _groups)
    if eps is not None or _groups:
        mixture = components.at_least_one((logits, means, logvars, scale_tril))
        return _by_noise(mu, logvar, mixture, seed, eps, num_samples, entropy, stl, precision, _groups)
    found = canonical({"mu": mu, "logvar": logvar}, logits, means, logvars, scale_tril, reorder=False)
    rows, mixture = found.rows, found.mixture
    seed = sampling.check_seed(seed, mu.device, "mu")
    if rows[0].shape[0] == 0:
        return found.restore(nothing(rows, mixture))
    return found.restore(apply(KLSamples, *rows, seed, *mixture, num_samples, precision, entropy, stl))
