"""KL divergence between diagonal Gaussians, one value per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _short as short
from fastkl.ops._closed_form import fill_normal_gradients, kl_per_sample, normal_gradients, unpack
from fastkl.ops._register import apply, differentiable, needs_closed_form, register
from fastkl.ops._scales import as_logvar
from fastkl.reference import SoftBounds

# q is [mu, parameter], or [head] that packs both along packed_dim; prior is [] or [prior_mu, prior_logvar], each of
# the full shape or, shared by the batch, of the event's shape.
_SETTINGS = "int packed_dim, Tensor[] prior, int event_ndim, str scale, float low, float high, bool live"


def _forward(q, packed_dim, prior, event_ndim, scale, low, high, live) -> Tensor:
    return kl_per_sample(q, packed_dim, prior, event_ndim, scale, arguments.as_bounds(low, high, live))


def _gradients(dkl, q, packed_dim, prior, event_ndim, scale, low, high, live) -> list[Tensor]:
    bounds = arguments.as_bounds(low, high, live)
    return normal_gradients(q, packed_dim, prior, scale, bounds, dkl=dkl.reshape(*dkl.shape, *[1] * event_ndim))


def _backward(dkl, q, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient) -> list[Tensor]:
    dkl, bounds = dkl.reshape(*dkl.shape, *[1] * event_ndim), arguments.as_bounds(low, high, live)
    return fill_normal_gradients(q, packed_dim, prior, scale, bounds, dkl=dkl, prior_gradient=prior_gradient)


def _fake_forward(q, packed_dim, prior, event_ndim, scale, low, high, live) -> Tensor:
    shape = unpack(q, packed_dim)[0].shape
    return q[0].new_empty(shape[: len(shape) - event_ndim], dtype=reference.compute_dtype(*q, *prior))


def _fake_backward(dkl, q, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in ([*q, *prior] if prior_gradient else q)]


kl_normal_fwd = register(
    f"kl_normal_fwd(Tensor[] q, {_SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="kl_normal.fwd",
    native="normal.kl_normal_fwd",
)
kl_normal_bwd = register(
    f"kl_normal_bwd(Tensor dkl, Tensor[] q, {_SETTINGS}, bool prior_gradient) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="kl_normal.bwd",
    native="normal.kl_normal_bwd",
)


def _differentiate(dkl, q, prior, settings, prior_gradient) -> list[Tensor]:
    arguments_ = (dkl, q, settings[0], prior, *settings[1:])
    return _gradients(*arguments_) if needs_closed_form(dkl) else kl_normal_bwd(*arguments_, prior_gradient)


def _differentiate_without_prior(dkl, mu, logvar, settings) -> list[Tensor]:
    return _differentiate(dkl, [mu, logvar], [], settings, False)


class _KLNormal(torch.autograd.Function):
    @staticmethod
    def forward(mu, parameter, prior_mu, prior_logvar, packed_dim, event_ndim, scale, low, high, live):
        q = [mu] if parameter is None else [mu, parameter]
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        return kl_normal_fwd(q, packed_dim, prior, event_ndim, scale, low, high, live)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx, dkl):
        mu, parameter, prior_mu, prior_logvar = ctx.saved_tensors
        q = [mu] if parameter is None else [mu, parameter]
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        gradients = _differentiate(dkl, q, prior, ctx.settings, any(ctx.needs_input_grad[2:4]))
        dq, dprior = gradients[: len(q)], gradients[len(q) :]
        return (*arguments.padded(dq), *arguments.padded(dprior), *[None] * len(ctx.settings))

    @staticmethod
    def vmap(info, in_dims, mu, parameter, prior_mu, prior_logvar, packed_dim, event_ndim, *settings):
        q = arguments.batch_first_all((mu, parameter), in_dims, info.batch_size)
        shape = unpack(q, packed_dim + 1)[0].shape
        prior = arguments.batch_first_prior((prior_mu, prior_logvar), in_dims[2:4], shape, event_ndim)
        return apply(_KLNormal, *arguments.padded(q), *prior, packed_dim + 1, event_ndim, *settings), 0


differentiable(
    "kl_normal_fwd",
    _KLNormal,
    lambda q, dim, prior, *rest: (*arguments.padded(q), *arguments.padded(prior), dim, *rest),
)


def kl_normal_packed(
    head: Tensor, dim: int, prior_mu: Tensor | float | None = None, prior_logvar: Tensor | float | None = None, *,
    event_ndim: int, scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """kl_normal(*head.chunk(2, dim), ...) whose gradient is one packed tensor, written by the kernel itself."""
    prior_mu, prior_logvar = arguments.as_tensors(head, prior_mu, prior_logvar)
    arguments.check_tensors(head=head, prior_mu=prior_mu, prior_logvar=prior_logvar)
    dim = arguments.check_packed(head, dim)
    half = head.chunk(2, dim)[0]
    event_ndim = arguments.event_ndim_of_datum(event_ndim, half.shape, "the posterior's shape")
    arguments.check_prior_fits(half.shape, prior_mu=prior_mu, prior_logvar=prior_logvar)
    prior = arguments.expand_prior(prior_mu, prior_logvar, head, half.shape, event_ndim)
    event_ndim, head, *prior = arguments.as_events(event_ndim, head, *prior)
    settings = (dim, event_ndim, arguments.check_scale(scale), *arguments.check_bounds(bounds))
    return apply(_KLNormal, head, None, *prior, *settings)


def kl_normal(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """KL divergence from a diagonal Gaussian to N(0, I) or to another one, in nats, one value per sample.

    KL(q || p) = 1/2 sum_d [exp(x_d) - 1 - x_d + (mu_d - prior_mu_d)^2 / exp(prior_logvar_d)], x = logvar - prior_logvar

    Args:
        mu: mean of q, [*batch, *event].
        logvar: ln sigma^2 of q, or what `scale` says; broadcasts with mu. One of the two may be a number.
        prior_mu, prior_logvar: mean and log-variance of p (or what `prior_scale` says, whatever `scale` is); absent
            (N(0, I)), of the full shape, a number, or shared by the batch ([*event], [1, *event]), whose gradient is
            then summed over the batch inside the kernel.
        event_ndim: how many of the last dimensions are summed. None: every dimension after the first, one value per
            datum for [N, D] and [N, C, H, W] alike; one dimension alone is that of one datum. 1 gives each token of
            [B, T, D] a value, 0 each element.
        scale: what the second argument is: "logvar", "log_std", "std" or "softplus" (sigma = softplus of it).
        prior_scale: what prior_logvar is, one of the same; its logarithm is taken in front of the kernel, in float32.
        bounds: (low, high) clamps the log-variance in the same pass, with no gradient outside;
            `fastkl.SoftBounds(low, high)` keeps the gradient alive there.

    Returns:
        [*batch], float32 for float16, bfloat16 and float32 input, float64 if any input is. Gradients come in each
        input's dtype; nothing is saved for the backward pass beyond the inputs.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes that do not broadcast, mixed devices, event_ndim out of range, an unknown scale, bounds in
            the wrong order.

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", arXiv:1312.6114, appendix B.

    >>> import torch, fastkl
    >>> mu, logvar = torch.zeros(2, 3), torch.full((2, 3), 1e-4)
    >>> [f"{kl:.1e}" for kl in fastkl.kl_normal(mu, logvar)]
    ['7.5e-09', '7.5e-09']
    """
    if known := arguments.usual(mu, logvar, event_ndim, scale, prior_mu, prior_logvar, bounds):
        if way := short.find("kl_normal", mu, logvar, known, scale, _differentiate_without_prior):
            return short.value(way, mu, logvar)
        return apply(_KLNormal, mu, logvar, None, None, -1, known, scale, *arguments.NO_BOUNDS)
    mu, logvar, prior_mu, prior_logvar = arguments.as_parameters(mu, logvar, prior_mu, prior_logvar)
    arguments.check_tensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    prior_logvar = as_logvar("prior_scale", prior_logvar, prior_scale, mu, logvar, prior_mu)
    shape = arguments.broadcast_shape(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    prior = arguments.expand_prior(prior_mu, prior_logvar, mu, shape, event_ndim)
    tensors = arguments.expand(mu, shape), arguments.expand(logvar, shape), *prior
    event_ndim, *tensors = arguments.as_events(event_ndim, *tensors)
    settings = (-1, event_ndim, arguments.check_scale(scale), *arguments.check_bounds(bounds))
    return apply(_KLNormal, *tensors, *settings)
