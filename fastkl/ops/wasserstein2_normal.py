"""Squared 2-Wasserstein distance between diagonal Gaussians, one value per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _short as short
from fastkl.ops._closed_form import fill_normal_gradients, normal_gradients
from fastkl.ops._register import apply, differentiable, needs_closed_form, register
from fastkl.ops._scales import as_logvar
from fastkl.reference import SoftBounds

# prior is [] or [prior_mu, prior_logvar], each of the full shape or, shared by the batch, of the event's shape.
_SETTINGS = "Tensor mu, Tensor parameter, Tensor[] prior, int event_ndim, str scale, float low, float high, bool live"


def _forward(mu, parameter, prior, event_ndim, scale, low, high, live) -> Tensor:
    settings = {"event_ndim": event_ndim, "scale": scale, "bounds": arguments.as_bounds(low, high, live)}
    tensors = [mu, parameter, *prior]
    return arguments.by_rows(lambda *rows: reference.wasserstein2_normal(*rows, **settings), mu, event_ndim, tensors)


def _arguments_of_gradient(ddistance, mu, parameter, prior, event_ndim, scale, low, high, live) -> tuple[tuple, dict]:
    if scale == "std":
        parameter = reference.above_zero(parameter.to(reference.compute_dtype(parameter)), scale)
    rows, bounds = ddistance.reshape(*ddistance.shape, *[1] * event_ndim), arguments.as_bounds(low, high, live)
    terms = {"dkl": rows, "terms_gradient": reference.wasserstein2_terms_gradient}
    return ([mu, parameter], -1, prior, scale, bounds), terms


def _gradients(ddistance, mu, parameter, prior, *settings) -> list[Tensor]:
    inputs, terms = _arguments_of_gradient(ddistance, mu, parameter, prior, *settings)
    dmu, dparameter, *dprior = normal_gradients(*inputs, **terms)
    return [dmu, dparameter.to(parameter.dtype), *dprior]


def _backward(ddistance, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient) -> list[Tensor]:
    settings = (event_ndim, scale, low, high, live)
    inputs, terms = _arguments_of_gradient(ddistance, mu, parameter, prior, *settings)
    dmu, dparameter, *dprior = fill_normal_gradients(*inputs, prior_gradient=prior_gradient, **terms)
    return [dmu, arguments.match(dparameter, parameter), *dprior]


def _fake_forward(mu, parameter, prior, event_ndim, scale, low, high, live) -> Tensor:
    return mu.new_empty(mu.shape[: mu.dim() - event_ndim], dtype=reference.compute_dtype(mu, parameter, *prior))


def _fake_backward(ddistance, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (mu, parameter, *(prior if prior_gradient else ()))]


wasserstein2_normal_fwd = register(
    f"wasserstein2_normal_fwd({_SETTINGS}) -> Tensor",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="wasserstein2_normal.fwd",
    native="normal.wasserstein2_normal_fwd",
)
wasserstein2_normal_bwd = register(
    f"wasserstein2_normal_bwd(Tensor ddistance, {_SETTINGS}, bool prior_gradient) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="wasserstein2_normal.bwd",
    native="normal.wasserstein2_normal_bwd",
)


def _differentiate(ddistance, mu, parameter, prior, settings, prior_gradient) -> list[Tensor]:
    if needs_closed_form(ddistance):
        return _gradients(ddistance, mu, parameter, prior, *settings)
    return wasserstein2_normal_bwd(ddistance, mu, parameter, prior, *settings, prior_gradient)


def _differentiate_without_prior(ddistance, mu, logvar, settings) -> list[Tensor]:
    return _differentiate(ddistance, mu, logvar, [], settings[1:], False)


class _Wasserstein2Normal(torch.autograd.Function):
    @staticmethod
    def forward(mu, parameter, prior_mu, prior_logvar, event_ndim, scale, low, high, live):
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        return wasserstein2_normal_fwd(mu, parameter, prior, event_ndim, scale, low, high, live)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx, ddistance):
        mu, parameter, prior_mu, prior_logvar = ctx.saved_tensors
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        gradients = _differentiate(ddistance, mu, parameter, prior, ctx.settings, any(ctx.needs_input_grad[2:4]))
        return (*gradients, *[None] * (4 - len(gradients)), *[None] * len(ctx.settings))

    @staticmethod
    def vmap(info, in_dims, mu, parameter, prior_mu, prior_logvar, event_ndim, *settings):
        q = arguments.batch_first_all((mu, parameter), in_dims, info.batch_size)
        prior = arguments.batch_first_prior((prior_mu, prior_logvar), in_dims[2:4], q[0].shape, event_ndim)
        return apply(_Wasserstein2Normal, *q, *prior, event_ndim, *settings), 0


differentiable(
    "wasserstein2_normal_fwd",
    _Wasserstein2Normal,
    lambda mu, parameter, prior, *rest: (mu, parameter, *arguments.padded(prior), *rest),
)


def wasserstein2_normal(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """Squared 2-Wasserstein distance from a diagonal Gaussian to N(0, I) or to another one, one value per sample.

    W_2^2(q, p) = sum_d [(mu_d - prior_mu_d)^2 + (sigma_d - prior_sigma_d)^2], sigma = exp(logvar / 2)

    Unlike the KL it stays finite as sigma -> 0. Near sigma = prior_sigma the difference is taken by expm1 and keeps its
    digits. For full covariances there is `fastkl.wasserstein2_multivariate_normal`.

    Args:
        mu, logvar, prior_mu, prior_logvar, event_ndim, scale, prior_scale, bounds: as for `fastkl.kl_normal`.

    Returns:
        [*batch], in squared units of z, float32 for float16, bfloat16 and float32 input, float64 if any input is.
        Gradients come in each input's dtype; nothing is saved for the backward pass beyond the inputs.

    Raises:
        TypeError, ValueError: as kl_normal.

    Source: Dowson and Landau 1982, "The Frechet distance between multivariate normal distributions", equation 4, for
    covariances that commute.

    >>> import torch, fastkl
    >>> mu, logvar = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2e-4, 2e-4]])
    >>> [f"{distance:.2g}" for distance in fastkl.wasserstein2_normal(mu, logvar)]
    ['9', '2e-08']
    """
    if known := arguments.usual(mu, logvar, event_ndim, scale, prior_mu, prior_logvar, bounds):
        if way := short.find("wasserstein2_normal", mu, logvar, known, scale, _differentiate_without_prior):
            return short.value(way, mu, logvar)
        return apply(_Wasserstein2Normal, mu, logvar, None, None, known, scale, *arguments.NO_BOUNDS)
    mu, logvar, prior_mu, prior_logvar = arguments.as_parameters(mu, logvar, prior_mu, prior_logvar)
    arguments.check_tensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    if prior_logvar is not None and prior_scale == "std":  # of a point prior it is 0
        prior_logvar = reference.above_zero(prior_logvar.to(reference.compute_dtype(prior_logvar)), prior_scale)
    prior_logvar = as_logvar("prior_scale", prior_logvar, prior_scale, mu, logvar, prior_mu)
    shape = arguments.broadcast_shape(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    prior = arguments.expand_prior(prior_mu, prior_logvar, mu, shape, event_ndim)
    tensors = arguments.expand(mu, shape), arguments.expand(logvar, shape), *prior
    event_ndim, *tensors = arguments.as_events(event_ndim, *tensors)
    settings = (event_ndim, arguments.check_scale(scale), *arguments.check_bounds(bounds))
    return apply(_Wasserstein2Normal, *tensors, *settings)
