"""Bounds by importance weights: IWAE, and its variants with a less noisy gradient of the encoder.

Each loss is minus its bound, for every choice of the encoder's gradient. Decoder and prior get the gradient of the
bound. With v = w / sum_l w_l over the samples of one estimate, and z = mu + sigma eps, the encoder gets

    "plain"  sum_l v_l d ln w_l / d phi, of the bound itself (Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519).
             Its ratio of signal to noise falls as 1 / sqrt(L).
    "stl"    sum_l v_l (d ln w_l / d z_l) (d z_l / d phi): sticking the landing (Roeder, Wu and Duvenaud 2017,
             arXiv:1703.09194). No noise if q is the exact posterior; unbiased for L = 1 only.
    "dreg"   sum_l v_l^2 (d ln w_l / d z_l) (d z_l / d phi): doubly reparameterised (Tucker, Lawson, Gu and Maddison
             2019, arXiv:1810.04152, equation 8). Unbiased, no noise if q is the exact posterior, and a ratio of signal
             to noise that grows with L.

Each needs one forward and one backward pass of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import distributions, reference
from fastkl.objectives import _loss
from fastkl.objectives._loss import LogLikelihood, Loss
from fastkl.ops import _arguments as arguments
from fastkl.ops._torch import forward_mode
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob
from fastkl.priors._prior import Prior

GRADIENTS = ("plain", "stl", "dreg")


class _Rescaled(torch.autograd.Function):
    """(z, handle): z [L, *batch, *event], whose gradient is multiplied by the handle's gradient [L, *batch].

    `_HandBack` sets the handle's gradient to factors that depend on later functions of z. Autograd delivers it before
    this backward runs, so no hook is needed, and torch.compile can trace it.
    """

    @staticmethod
    def forward(z, event_ndim):
        return z.view_as(z), z.new_zeros(z.shape[: z.dim() - event_ndim], dtype=reference.compute_dtype(z))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.event_ndim = inputs[1]

    @staticmethod
    def backward(ctx, dz, factors):
        return (dz * factors.reshape(*factors.shape, *[1] * ctx.event_ndim)).to(dz.dtype), None


class _HandBack(torch.autograd.Function):
    """log_w unchanged, with its gradient; the handle's gradient is `factors`."""

    @staticmethod
    def forward(log_w, handle, factors):
        return log_w.view_as(log_w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, dlog_w):
        (factors,) = ctx.saved_tensors
        return dlog_w, factors, None


def _log_q(posterior: distributions.DiagonalNormal, z: Tensor, gradient: str) -> Tensor:
    """ln q(z); its parameters are detached unless the gradient is "plain"."""
    if gradient == "plain":
        return posterior.log_prob(z)
    fixed = (posterior.mean.detach(), posterior.exact_logvar.detach())
    return normal_log_prob(z, *fixed, event_ndim=posterior.event_ndim)


def _checked(posterior, prior, log_likelihood, num_estimates, num_samples, gradient) -> None:
    _loss.check(posterior, prior, log_likelihood)
    arguments.check_int("num_estimates", num_estimates, 1)
    arguments.check_int("num_samples", num_samples, 1)
    arguments.check_choice("gradient", gradient, GRADIENTS)


def _made_of(bound: Tensor, reconstruction: Tensor, log_w: Tensor, loss: Tensor | None = None, **terms: Tensor) -> Loss:
    """The Loss of a bound [*batch] with log-weights log_w [M, L, *batch]."""
    log_w = log_w.detach()
    return _loss.made_of(
        -bound.mean() if loss is None else loss,
        bound=bound,
        **terms,
        reconstruction=reconstruction,
        kl=reconstruction.detach() - log_w.reshape(reconstruction.shape),
        effective_sample_size=reference.effective_sample_size(log_w, 1),
        weight_entropy=reference.weight_entropy(log_w, 1),
    )


def _combined(
    posterior, prior, log_likelihood, num_estimates: int, num_samples: int, gradient: str, eps, beta=None
) -> Loss:
    """The mean of M estimates beta ELBO + (1 - beta) IWAE_L; a beta of None is 0."""
    _checked(posterior, prior, log_likelihood, num_estimates, num_samples, gradient)
    z, handle = _loss.draws(posterior, num_estimates * num_samples, eps), None
    if gradient == "dreg":
        if forward_mode():
            raise NotImplementedError('gradient="dreg" has no forward-mode derivative: it defines only a gradient')
        z, handle = _Rescaled.apply(z, posterior.event_ndim)
    reconstruction = _loss.reconstruction_of(posterior, log_likelihood, z)
    log_w = reconstruction + _loss.log_prior(posterior, prior, z) - _log_q(posterior, z, gradient)
    grouped = (num_estimates, num_samples, *log_w.shape[1:])

    def mix(of_elbo, of_iwae):  # without a beta the ELBO is left out, because 0 * -inf is NaN
        return of_iwae if beta is None else beta * of_elbo + (1 - beta) * of_iwae

    if handle is not None:
        v = reference.importance_weights(log_w.detach().reshape(grouped), 1)
        plain, doubly = mix(1 / num_samples, v), mix(1 / num_samples, v * v)
        factors = torch.where(plain > 0, doubly / plain, 0.0)
        log_w = _HandBack.apply(log_w, handle, factors.reshape(log_w.shape).to(handle.dtype))
    log_w = log_w.reshape(grouped)
    bound = mix(log_w.mean(1), reference.iwae(log_w, 1)).mean(0)
    return _made_of(bound, reconstruction, log_w)


def iwae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *, num_samples: int,
    gradient: str = "plain", eps: Tensor | None = None,
) -> Loss:  # fmt: skip
    """Minus the importance-weighted bound, mean over the batch.

    -ln 1/L sum_l w_l, ln w_l = ln p(x | z_l) + ln p(z_l) - ln q(z_l | x), z_l ~ q

    Args:
        posterior: q(z | x), a fastkl.DiagonalNormal with a batch dimension.
        prior: one of fastkl.priors, or None for N(0, I).
        log_likelihood: z [L, *batch, *event] -> ln p(x | z) [L, *batch] in nats, one value for each z.
        num_samples: L.
        gradient: the encoder's gradient: "plain", of the bound; "dreg", with the same mean and far less noise at large
            L; "stl", with little noise but biased for L > 1. Decoder and prior get the gradient of the bound.
        eps: the noise [L, *batch, *event]; None draws it.

    Returns:
        Loss(loss, terms): terms are bound; reconstruction and kl, unweighted means over the same samples;
        effective_sample_size and weight_entropy.

    Raises:
        TypeError, ValueError: an argument or log_likelihood(z) has the wrong type, shape or range.

    Source: Burda, Grosse and Salakhutdinov 2016, arXiv:1509.00519; Roeder, Wu and Duvenaud 2017, arXiv:1703.09194;
    Tucker et al. 2019, arXiv:1810.04152, equation 8.

    >>> import torch, fastkl
    >>> x = torch.tensor([[1.0], [-2.0]])  # p(z) = N(0, 1), p(x | z) = N(z, 1)
    >>> likelihood = lambda z: fastkl.normal_log_prob(x, z, torch.zeros(()), event_ndim=1)
    >>> q = fastkl.DiagonalNormal(x / 2, torch.full((2, 1), 0.5).log())  # the exact posterior: every weight is p(x)
    >>> fastkl.objectives.iwae(q, None, likelihood, num_samples=8).loss
    tensor(1.8905)
    """
    return _combined(posterior, prior, log_likelihood, 1, num_samples, gradient, eps)


def miwae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *, num_samples: int,
    num_estimates: int, gradient: str = "plain", eps: Tensor | None = None,
) -> Loss:  # fmt: skip
    """Minus the mean of several importance-weighted bounds with independent samples: less noise, equal tightness.

    -1/M sum_m ln 1/L sum_l w_ml

    Args:
        num_samples, num_estimates: L and M. The decoder gets z [M L, *batch, *event], with the samples of an estimate
            adjacent.
        eps: the noise [M L, *batch, *event].
        posterior, prior, log_likelihood, gradient: as for `iwae`.

    Returns:
        As `iwae`; effective_sample_size and weight_entropy are those of an estimate's L samples.

    Raises:
        TypeError, ValueError: as `iwae`.

    Source: Rainforth et al. 2018, "Tighter Variational Bounds are Not Necessarily Better", arXiv:1802.04537, section 5.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2))
    >>> loss, terms = fastkl.objectives.miwae(q, None, lambda z: -z.square().sum(-1), num_samples=8, num_estimates=3)
    >>> list(terms)
    ['bound', 'reconstruction', 'kl', 'effective_sample_size', 'weight_entropy']
    """
    return _combined(posterior, prior, log_likelihood, num_estimates, num_samples, gradient, eps)


def ciwae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *, num_samples: int,
    beta: float | Tensor, gradient: str = "plain", eps: Tensor | None = None,
) -> Loss:  # fmt: skip
    """Minus a combination of the ELBO and the importance-weighted bound, with the same samples.

    -[beta 1/L sum_l ln w_l + (1 - beta) ln 1/L sum_l w_l]

    Args:
        beta: from 0 (the importance-weighted bound) to 1 (the ELBO), a number or a tensor with one value (a tensor can
            be scheduled without recompiling).
        posterior, prior, log_likelihood, num_samples, gradient, eps: as for `iwae`. For the ELBO part, "dreg" is
            sticking the landing, which is unbiased there.

    Returns:
        As `iwae`.

    Raises:
        TypeError, ValueError: as `iwae`; beta is not a number from 0 to 1.

    Source: Rainforth et al. 2018, arXiv:1802.04537, section 5.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2))
    >>> loss, terms = fastkl.objectives.ciwae(q, None, lambda z: -z.square().sum(-1), num_samples=8, beta=0.5)
    >>> bool(terms["bound"] > terms["reconstruction"] - terms["kl"])
    True
    """
    beta = arguments.check_weight("beta", beta)
    if not isinstance(beta, Tensor) and beta > 1:
        raise ValueError(f"beta must be from 0 to 1, got {beta}")
    share = None if not isinstance(beta, Tensor) and beta == 0 else beta
    return _combined(posterior, prior, log_likelihood, 1, num_samples, gradient, eps, share)


def piwae(
    posterior: distributions.DiagonalNormal, prior: Prior | None, log_likelihood: LogLikelihood, *, num_samples: int,
    num_estimates: int, gradient: str = "plain", eps: Tensor | None = None,
) -> Loss:  # fmt: skip
    """Two bounds with the same samples: the tightest one for decoder and prior, a less noisy one for the encoder.

    decoder and prior: -ln 1/(M L) sum_ml w_ml; encoder: -1/M sum_m ln 1/L sum_l w_ml, as `miwae`

    The decoder's forward pass is differentiated twice, first in its input only. (For a compiled decoder that was
    trained before by another loss, this needs `torch._functorch.config.donated_buffer = False`.)

    Args:
        posterior, prior, log_likelihood, num_samples, num_estimates, gradient, eps: as for `miwae`.

    Returns:
        Loss(loss, terms): loss has the value of the first; terms are bound (the first), encoder_bound (the second), and
        the other terms of `miwae`.

    Raises:
        TypeError, ValueError: as `iwae`.

    Source: Rainforth et al. 2018, arXiv:1802.04537, section 5.

    >>> import torch, fastkl
    >>> q = fastkl.DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2))
    >>> loss, terms = fastkl.objectives.piwae(q, None, lambda z: -z.square().sum(-1), num_samples=8, num_estimates=3)
    >>> bool(terms["bound"] > terms["encoder_bound"])  # Jensen
    True
    """
    _checked(posterior, prior, log_likelihood, num_estimates, num_samples, gradient)
    z = _loss.draws(posterior, num_estimates * num_samples, eps)
    encoded = z.requires_grad
    leaf = z.detach().requires_grad_(encoded)
    reconstruction = _loss.reconstruction_of(posterior, log_likelihood, leaf)
    joint = reconstruction + _loss.log_prior(posterior, prior, leaf)
    log_q = _log_q(posterior, z, gradient)
    log_w = joint - log_q.detach()
    bound = reference.iwae(log_w, 0)
    grouped = log_w.reshape(num_estimates, num_samples, *log_w.shape[1:])
    loss = -bound.mean()
    if encoded:
        v = reference.importance_weights(grouped.detach(), 1)
        v = (v * v if gradient == "dreg" else v).reshape(log_w.shape)
        (dz,) = torch.autograd.grad(joint, leaf, v.to(joint.dtype), retain_graph=True)
        # Divided last: the gradients of a 16-bit decoder could underflow if divided earlier.
        encoder = ((v * log_q).sum() - (dz * z).sum()) / (num_estimates * bound.numel())
        loss = loss + (encoder - encoder.detach())
    encoder_bound = reference.iwae(grouped.detach(), 1).mean(0)
    return _made_of(bound, reconstruction, grouped, loss, encoder_bound=encoder_bound)
