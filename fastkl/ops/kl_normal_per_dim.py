"""KL divergence between diagonal Gaussians of every latent dimension, averaged over the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._closed_form import fill_normal_gradients, normal_gradients
from fastkl.ops._register import apply, differentiable, needs_closed_form, register
from fastkl.ops._scales import as_logvar
from fastkl.reference import SoftBounds

# prior is [] or [prior_mu, prior_logvar], each of the full shape or, shared by the batch, of the event's shape.
_SETTINGS = "int event_ndim, str scale, float low, float high, bool live"


def _forward(mu, parameter, prior, event_ndim, scale, low, high, live) -> Tensor:
    bounds = arguments.as_bounds(low, high, live)
    return reference.kl_normal_per_dim(mu, parameter, *prior, event_ndim=event_ndim, scale=scale, bounds=bounds)


def _gradients(dkl, mu, parameter, prior, event_ndim, scale, low, high, live) -> list[Tensor]:
    share = dkl / max(1, math.prod(mu.shape[: mu.dim() - event_ndim]))  # broadcasts with mu
    bounds = arguments.as_bounds(low, high, live)
    return normal_gradients([mu, parameter], -1, prior, scale, bounds, dkl=share)


def _backward(dkl, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient) -> list[Tensor]:
    share = dkl / max(1, math.prod(mu.shape[: mu.dim() - event_ndim]))
    bounds = arguments.as_bounds(low, high, live)
    q = [mu, parameter]
    return fill_normal_gradients(q, -1, prior, scale, bounds, dkl=share, prior_gradient=prior_gradient)


def _fake_forward(mu, parameter, prior, event_ndim, scale, low, high, live) -> Tensor:
    return mu.new_empty(mu.shape[mu.dim() - event_ndim :], dtype=reference.compute_dtype(mu, parameter, *prior))


def _fake_backward(dkl, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (mu, parameter, *(prior if prior_gradient else ()))]


kl_normal_per_dim_fwd = register(
    f"kl_normal_per_dim_fwd(Tensor mu, Tensor parameter, Tensor[] prior, {_SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="kl_normal_per_dim.fwd",
    native="normal.kl_normal_per_dim_fwd",
)
kl_normal_per_dim_bwd = register(
    "kl_normal_per_dim_bwd(Tensor dkl, Tensor mu, Tensor parameter, Tensor[] prior, "
    f"{_SETTINGS}, bool prior_gradient) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="kl_normal_per_dim.bwd",
    native="normal.kl_normal_per_dim_bwd",
)


class _KLNormalPerDim(torch.autograd.Function):
    @staticmethod
    def forward(mu, parameter, prior_mu, prior_logvar, event_ndim, scale, low, high, live):
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        return kl_normal_per_dim_fwd(mu, parameter, prior, event_ndim, scale, low, high, live)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx, dkl):
        mu, parameter, prior_mu, prior_logvar = ctx.saved_tensors
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        if needs_closed_form(dkl):
            gradients = _gradients(dkl, mu, parameter, prior, *ctx.settings)
        else:
            prior_gradient = any(ctx.needs_input_grad[2:4])
            gradients = kl_normal_per_dim_bwd(dkl, mu, parameter, prior, *ctx.settings, prior_gradient)
        return (*gradients, *[None] * (4 - len(gradients)), *[None] * len(ctx.settings))

    @staticmethod
    def vmap(info, in_dims, mu, parameter, prior_mu, prior_logvar, event_ndim, *settings):
        # The vmapped dimension is not averaged over: it becomes the first dimension of the event.
        tensors = [
            None if tensor is None else arguments.batch_first(tensor, dim, info.batch_size).movedim(0, -event_ndim - 1)
            for tensor, dim in zip((mu, parameter, prior_mu, prior_logvar), in_dims)
        ]
        return apply(_KLNormalPerDim, *tensors, event_ndim + 1, *settings), 0


differentiable(
    "kl_normal_per_dim_fwd", _KLNormalPerDim,
    lambda mu, parameter, prior, *rest: (mu, parameter, *arguments.padded(prior), *rest),
)  # fmt: skip


def kl_normal_per_dim(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """KL divergence from a diagonal Gaussian to N(0, I) or to another one, in nats, one batch mean per dimension.

    KL_d = 1/2 mean_n [exp(x_nd) - 1 - x_nd + (mu_nd - prior_mu_d)^2 / exp(prior_logvar_d)], x = logvar - prior_logvar

    What free bits (`torch.clamp(kl, min=0.25).sum()`) and the count of active units need: nothing of the inputs' size
    is written on the way.

    Args:
        mu: mean of q, [*batch, *event].
        logvar: ln sigma^2 of q, or what `scale` says; broadcasts with mu. One of the two may be a number.
        prior_mu, prior_logvar: mean and log-variance of p (or what `prior_scale` says, whatever `scale` is); absent
            (N(0, I)), of the full shape, a number, or shared by the batch ([*event], [1, *event]), whose gradient is
            then summed over the batch inside the kernel.
        event_ndim: how many of the last dimensions are kept, one at least; the mean is over all dimensions before
            them. None: every dimension after the first; one dimension alone is that of one datum.
        scale: what the second argument is: "logvar", "log_std", "std" or "softplus" (sigma = softplus of it).
        prior_scale: what prior_logvar is, one of the same; its logarithm is taken in front of the kernel, in float32.
        bounds: (low, high) clamps the log-variance in the same pass, with no gradient outside;
            `fastkl.SoftBounds(low, high)` keeps the gradient alive there.

    Returns:
        [*event], float32 for float16, bfloat16 and float32 input, float64 if any input is; NaN for an empty batch, as
        torch.mean. Gradients come in each input's dtype; nothing is saved for the backward pass beyond the inputs.

    Raises:
        TypeError: an argument is not a floating-point tensor, or event_ndim is not an int.
        ValueError: shapes that do not broadcast, mixed devices, event_ndim out of range, an unknown scale, bounds in
            the wrong order.

    Source: Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow", arXiv:1606.04934,
    equation 16 (free bits).

    >>> import torch, fastkl
    >>> mu, logvar = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.zeros(2, 2)
    >>> fastkl.kl_normal_per_dim(mu, logvar)
    tensor([0.0000, 2.5000])
    """
    if known := arguments.usual(mu, logvar, event_ndim, scale, prior_mu, prior_logvar, bounds):
        return apply(_KLNormalPerDim, mu, logvar, None, None, known, scale, *arguments.NO_BOUNDS)
    mu, logvar, prior_mu, prior_logvar = arguments.as_parameters(mu, logvar, prior_mu, prior_logvar)
    arguments.check_tensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    prior_logvar = as_logvar("prior_scale", prior_logvar, prior_scale, mu, logvar, prior_mu)
    shape = arguments.broadcast_shape(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    if event_ndim == 0:
        raise ValueError("event_ndim must be at least 1, got 0: without a latent dimension none has a value of its own")
    prior = arguments.expand_prior(prior_mu, prior_logvar, mu, shape, event_ndim)
    settings = (event_ndim, arguments.check_scale(scale), *arguments.check_bounds(bounds))
    return apply(_KLNormalPerDim, arguments.expand(mu, shape), arguments.expand(logvar, shape), *prior, *settings)
