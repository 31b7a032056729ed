"""Reparameterised sampling and the KL in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops import _short as short
from fastkl.ops._closed_form import (
    empty_samples,
    fill_normal_gradients,
    kl_per_sample,
    normal_gradients,
    sample,
    samples_dtype,
    unpack,
)
from fastkl.ops._register import apply, differentiable, needs_closed_form, register
from fastkl.ops._scales import as_logvar
from fastkl.reference import SoftBounds

# As in kl_normal; exactly one of seed (int64, no dimensions) and eps ([L, *shape], or [*shape] without num_samples).
_SETTINGS = (
    "Tensor[] q, Tensor? seed, Tensor? eps, SymInt? num_samples, int packed_dim, Tensor[] prior, int event_ndim, "
    "str scale, float low, float high, bool live"
)


def _forward(q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live):
    eps, bounds = sampling.draw(q, packed_dim, seed, eps, num_samples), arguments.as_bounds(low, high, live)
    z = sample(q, packed_dim, eps, num_samples, scale, bounds)
    return z, kl_per_sample(q, packed_dim, prior, event_ndim, scale, bounds)


def _gradients(dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live):
    eps = None if dz is None else sampling.noise(q, packed_dim, seed, eps, num_samples)
    bounds = arguments.as_bounds(low, high, live)
    if dkl is None:  # not a KL gradient of zero, which an infinite KL would turn into NaN
        dq = normal_gradients(q, packed_dim, [], scale, bounds, dz=dz, eps=eps)
        return dq + [torch.zeros_like(tensor) for tensor in prior]
    dkl = dkl.reshape(*dkl.shape, *[1] * event_ndim)
    return normal_gradients(q, packed_dim, prior, scale, bounds, dkl=dkl, dz=dz, eps=eps)


def _backward(
    dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient
):  # fmt: skip
    eps = None if dz is None else sampling.draw(q, packed_dim, seed, eps, num_samples)
    bounds = arguments.as_bounds(low, high, live)
    if dkl is None:
        dq = fill_normal_gradients(q, packed_dim, [], scale, bounds, dz=dz, eps=eps)
        return dq + [torch.zeros_like(tensor) for tensor in prior if prior_gradient]
    dkl = dkl.reshape(*dkl.shape, *[1] * event_ndim)
    settings = {"dkl": dkl, "dz": dz, "eps": eps, "prior_gradient": prior_gradient}
    return fill_normal_gradients(q, packed_dim, prior, scale, bounds, **settings)


def _fake_forward(q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live):
    z, mu = empty_samples(q, packed_dim, num_samples), unpack(q, packed_dim)[0]
    return z, mu.new_empty(mu.shape[: mu.dim() - event_ndim], dtype=reference.compute_dtype(*q, *prior))


def _fake_backward(
    dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient
):  # fmt: skip
    return [torch.empty_like(tensor) for tensor in ([*q, *prior] if prior_gradient else q)]


rsample_kl_fwd = register(
    f"rsample_kl_fwd({_SETTINGS}) -> (Tensor, Tensor)",
    closed_form=_forward,
    fake=_fake_forward,
    kernel="rsample_kl.fwd",
    native="normal.rsample_kl_fwd",
)
rsample_kl_bwd = register(
    f"rsample_kl_bwd(Tensor? dz, Tensor? dkl, {_SETTINGS}, bool prior_gradient) -> Tensor[]",
    closed_form=_backward,
    fake=_fake_backward,
    kernel="rsample_kl.bwd",
    native="normal.rsample_kl_bwd",
)


def _differentiate(dz, dkl, q, noise, prior, settings, prior_gradient) -> list[Tensor]:
    num_samples, packed_dim, *rest = settings
    values = (dz, dkl, q, *noise, num_samples, packed_dim, prior, *rest)
    if needs_closed_form(*(d for d in (dz, dkl) if d is not None)):
        return _gradients(*values)
    return rsample_kl_bwd(*values, prior_gradient)


def _differentiate_without_prior(dz, dkl, mu, logvar, seed, settings) -> list[Tensor | None]:
    if dz is None and dkl is None:
        return [None, None]
    return _differentiate(dz, dkl, [mu, logvar], (seed, None), [], settings, False)


class _RsampleKL(torch.autograd.Function):
    @staticmethod
    def forward(
        mu, parameter, prior_mu, prior_logvar, eps, seed, num_samples, packed_dim, event_ndim, scale, low, high, live
    ):
        q = [mu] if parameter is None else [mu, parameter]
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        return rsample_kl_fwd(q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.settings = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dz, dkl):
        mu, parameter, prior_mu, prior_logvar, eps, seed = ctx.saved_tensors
        _, packed_dim, _, scale, *bounds = ctx.settings
        if dz is None and dkl is None:
            return (None,) * (6 + len(ctx.settings))
        q = [mu] if parameter is None else [mu, parameter]
        prior = [] if prior_mu is None else [prior_mu, prior_logvar]
        noise = (seed, eps)
        gradients = _differentiate(dz, dkl, q, noise, prior, ctx.settings, any(ctx.needs_input_grad[2:4]))
        dq, dprior = gradients[: len(q)], gradients[len(q) :]
        deps = None
        if ctx.needs_input_grad[4] and dz is not None:
            deps = sampling.noise_gradient(dz, q, packed_dim, eps, scale, arguments.as_bounds(*bounds))
        padding = [None] * (1 + len(ctx.settings))
        return (*arguments.padded(dq), *arguments.padded(dprior), deps, *padding)

    @staticmethod
    def vmap(
        info, in_dims, mu, parameter, prior_mu, prior_logvar, eps, seed, num_samples, packed_dim, event_ndim, *rest
    ):
        out_dtype = samples_dtype(mu, parameter)
        q = arguments.batch_first_all((mu, parameter), in_dims, info.batch_size)
        shape = unpack(q, packed_dim + 1)[0].shape
        prior = arguments.batch_first_prior((prior_mu, prior_logvar), in_dims[2:4], shape, event_ndim)
        dims = (in_dims[5], in_dims[4])
        seed, eps = sampling.batch_noise(info, q, packed_dim + 1, dims, seed, eps, num_samples)
        parameter = q[1] if len(q) == 2 else None
        settings = (num_samples, packed_dim + 1, event_ndim, *rest)
        z, kl = apply(_RsampleKL, q[0], parameter, *prior, eps, seed, *settings)
        return (z.to(out_dtype), kl), (0 if num_samples is None else 1, 0)


def _inputs(q, seed, eps, num_samples, packed_dim, prior, *rest) -> tuple:
    return *arguments.padded(q), *arguments.padded(prior), eps, seed, num_samples, packed_dim, *rest


differentiable("rsample_kl_fwd", _RsampleKL, _inputs)


def rsample_kl_packed(
    head: Tensor, dim: int, prior_mu: Tensor | float | None = None, prior_logvar: Tensor | float | None = None, *,
    event_ndim: int, num_samples: int | None = None, seed: int | Tensor | None = None, eps: Tensor | None = None,
    scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rsample_kl(*head.chunk(2, dim), ...) whose gradient is one packed tensor, written by the kernel itself."""
    prior_mu, prior_logvar = arguments.as_tensors(head, prior_mu, prior_logvar)
    arguments.check_tensors(head=head, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps)
    dim = arguments.check_packed(head, dim)
    shape = head.chunk(2, dim)[0].shape
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape, "the posterior's shape")
    arguments.check_prior_fits(shape, prior_mu=prior_mu, prior_logvar=prior_logvar)
    prior = arguments.expand_prior(prior_mu, prior_logvar, head, shape, event_ndim)
    settings = (arguments.check_scale(scale), *arguments.check_bounds(bounds))
    seed, eps = sampling.check_noise(seed, eps, num_samples, shape, head.device)
    op_ndim, head, *tensors = arguments.as_events(event_ndim, head, *prior, eps)
    z, kl = apply(_RsampleKL, head, None, *tensors, seed, num_samples, dim, op_ndim, *settings)
    return (z if event_ndim else z.squeeze(-1)), kl


def rsample_kl(
    mu: Tensor | float, logvar: Tensor | float, prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None, *, event_ndim: int | None = None, num_samples: int | None = None,
    seed: int | Tensor | None = None, eps: Tensor | None = None, scale: str = "logvar",
    prior_scale: str = "logvar", bounds: SoftBounds | tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A reparameterised sample and the KL divergence in one pass over the parameters.

    z = mu + exp(logvar / 2) eps, eps ~ N(0, I);  kl as `fastkl.kl_normal`, in nats

    Args:
        mu, logvar, prior_mu, prior_logvar, event_ndim, scale, prior_scale, bounds: as for `fastkl.kl_normal`; bounds
            hold for the sample's sigma too. The prior may not be larger than the posterior: there is one z
            for each posterior.
        num_samples: L samples of each posterior, [L, *batch, *event]; None for one without that dimension.
        seed: an int, or an int64 tensor without dimensions on mu's device: the same seed gives the same noise on every
            device and for every dtype (to rounding). Default: drawn from torch's generator of that device, so
            torch.manual_seed reproduces a run.
        eps: the caller's own noise instead, of the samples' shape (quasi-Monte-Carlo, exact comparisons).

    Returns:
        (z, kl): z in the parameters' dtype, [*batch, *event] or [L, *batch, *event]; kl [*batch] as from kl_normal.
        The noise is Philox, drawn in the kernel and again in its backward pass; only the 8-byte seed is kept.

    Raises:
        TypeError, ValueError: as kl_normal; seed and eps together, an eps or seed of another shape, num_samples < 1.

    Source: Kingma and Welling 2014, arXiv:1312.6114, section 2.4; Salmon et al. 2011, "Parallel random numbers: as easy
        as 1, 2, 3" (Philox4x32-7).

    >>> import torch, fastkl
    >>> z, kl = fastkl.rsample_kl(torch.zeros(2, 3), torch.zeros(2, 3), num_samples=5, seed=0)
    >>> z.shape, kl
    (torch.Size([5, 2, 3]), tensor([0., 0.]))
    """
    if known := arguments.usual(mu, logvar, event_ndim, scale, prior_mu, prior_logvar, bounds, eps, num_samples):
        seed = sampling.check_seed(seed, mu.device, "mu")
        if way := short.find("rsample_kl", mu, logvar, known, scale, _differentiate_without_prior, seed):
            return short.sample_and_value(way, mu, logvar, seed)
        settings = (None, -1, known, scale, *arguments.NO_BOUNDS)
        return apply(_RsampleKL, mu, logvar, None, None, None, seed, *settings)
    given = (mu, logvar)
    mu, logvar, prior_mu, prior_logvar = arguments.as_parameters(*given, prior_mu, prior_logvar)
    arguments.check_tensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps)
    prior_logvar = as_logvar("prior_scale", prior_logvar, prior_scale, mu, logvar, prior_mu)
    shape = arguments.broadcast_shape(mu=mu, logvar=logvar)
    arguments.check_prior_fits(shape, prior_mu=prior_mu, prior_logvar=prior_logvar)
    event_ndim = arguments.event_ndim_of_datum(event_ndim, shape)
    prior = arguments.expand_prior(prior_mu, prior_logvar, mu, shape, event_ndim)
    settings = (arguments.check_scale(scale), *arguments.check_bounds(bounds))
    seed, eps = sampling.check_noise(seed, eps, num_samples, shape, mu.device)
    q = arguments.expand(mu, shape), arguments.expand(logvar, shape)
    op_ndim, *tensors = arguments.as_events(event_ndim, *q, *prior, eps)
    z, kl = apply(_RsampleKL, *tensors, seed, num_samples, -1, op_ndim, *settings)
    return (z if event_ndim else z.squeeze(-1)).to(samples_dtype(*given)), kl
