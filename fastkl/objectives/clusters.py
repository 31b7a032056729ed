"""Variational deep embedding: the ELBO with the component of a mixture as a second latent variable."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import distributions, reference
from fastkl.objectives._loss import LogLikelihood, Loss, check, draws, flat, made_of, reconstruction_of
from fastkl.ops._arguments import check_weight
from fastkl.ops._register import no_autocast
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob
from fastkl.ops.mixture.gmm_responsibilities import gmm_responsibilities
from fastkl.priors.mixture import Mixture, MixturePrior


def vade(
    posterior: distributions.DiagonalNormal, prior: MixturePrior, log_likelihood: LogLikelihood, *,
    beta: float | Tensor = 1.0, num_samples: int = 1, eps: Tensor | None = None,
) -> Loss:  # fmt: skip
    """Minus the ELBO of variational deep embedding, mean over the batch.

    -E_q[ln p(x | z)] + beta (sum_k r_k KL(q(z | x) || N_k) + KL(r || pi)), r_k = p(k | z), z ~ q(z | x)

    r is computed in logarithms, without a floor, and it counts a component's weight once. The loss has the gradient
    through r. The KL is an upper bound of KL(q || p), and at least `kl(method="upper")`.

    Args:
        posterior, log_likelihood: as for `elbo`.
        prior: a mixture: GaussianMixture, of any covariance, or VampPrior.
        beta: weight of the KL.
        num_samples: number of samples z; r and the reconstruction are means over them.
        eps: their noise [num_samples, *batch, *event]; None draws it.

    Returns:
        Loss(loss, terms): terms are elbo, reconstruction, kl and kl_components, KL(r || pi), in nats. Temporaries have
        the size [num_samples, *batch, K], never batch x K x D.

    Raises:
        TypeError: the prior is not a mixture. ValueError: it has another number of dimensions.

    Source: Jiang et al. 2017, "Variational Deep Embedding", arXiv:1611.05148, equations 8 and 16.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.randn(8, 2), torch.zeros(8, 2))
    >>> prior = fastkl.priors.GaussianMixture(components=5, dim=2)
    >>> loss, terms = fastkl.objectives.vade(q, prior, lambda z: 0 * z.sum(-1))
    >>> bool(loss >= prior.kl(q, method="upper").mean()), list(terms)
    (True, ['elbo', 'reconstruction', 'kl', 'kl_components'])
    """
    check(posterior, prior, log_likelihood)
    if not isinstance(prior, MixturePrior):
        raise TypeError(f"prior must be a mixture (fastkl.priors.MixturePrior), got {type(prior).__name__}")
    beta = check_weight("beta", beta)
    z = draws(posterior, num_samples, eps)
    reconstruction = reconstruction_of(posterior, log_likelihood, z).mean(0)
    kl_latent, kl_components = _kls(posterior, prior, flat(posterior, z))
    kl = kl_latent + kl_components
    terms = {"elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl, "kl_components": kl_components}
    return made_of((beta * kl - reconstruction).mean(), **terms)


def _kls(posterior: distributions.DiagonalNormal, prior: MixturePrior, z: Tensor) -> tuple[Tensor, Tensor]:
    """sum_k r_k KL(q || N_k) and KL(r || pi) [*batch]."""
    mu, logvar, mixture = prior._both(posterior)
    # Cast first: the gradients of all parts are summed in this dtype.
    dtype = reference.compute_dtype(mu, logvar, z, *(tensor for tensor in mixture if tensor is not None))
    mu, logvar, z = mu.to(dtype), logvar.to(dtype), z.to(dtype)
    logits, means = mixture.logits.to(dtype), mixture.means.to(dtype)
    logvars, scale_tril = (None if tensor is None else tensor.to(dtype) for tensor in mixture[2:])
    mixture = Mixture(logits, means, logvars, scale_tril)
    with no_autocast(z.device.type):
        log_r = gmm_responsibilities(z, **mixture.named(), precision=prior.precision)
        # ln N(mu; m_k, S_k) from p(k | mu): needs no [*batch, K, D], and avoids the cancellation of an expanded square.
        at_mean = gmm_responsibilities(mu, **mixture.named(), precision=prior.precision)
        at_mean = at_mean + gmm_log_prob(mu, **mixture.named(), precision=prior.precision).unsqueeze(-1)
        log_pi = torch.log_softmax(logits, -1)
        excluded = log_pi == float("-inf")
        log_normal = at_mean - log_pi.masked_fill(excluded, 0.0)
        trace = logvar.exp() @ _precisions(means, logvars, scale_tril).mT  # sum_d sigma^2 / S_kd
        cross = (log_normal - 0.5 * trace).masked_fill(excluded, 0.0)  # E_q ln N_k
        r = log_r.exp()
        kl = -reference.normal_entropy(logvar) - (r * cross).sum(-1)
        # A component of probability 0 adds 0. Unmasked, a weight of 0 gives -inf - -inf, and an underflow 0 * -inf.
        surprise = (log_r - log_pi).masked_fill(log_r == float("-inf"), 0.0)
        return kl.mean(0), (r * surprise).sum(-1).mean(0)


def _precisions(means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None) -> Tensor:
    """The diagonals of S_k^-1 [K, D]."""
    if scale_tril is not None:
        identity = torch.eye(means.shape[-1], dtype=scale_tril.dtype, device=scale_tril.device)
        return torch.linalg.solve_triangular(scale_tril, identity, upper=False).square().sum(-2)
    return (torch.zeros_like(means) if logvars is None else -logvars).exp().expand(means.shape)
