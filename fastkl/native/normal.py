"""Arguments of normal.c: kl_normal, kl_normal_per_dim, wasserstein2_normal, rsample_normal and rsample_kl.

float64 samples are drawn by the closed form, whose noise is bit-identical to the definition. The loop's noise equals it
up to float32 rounding, which would be visible in float64.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from fastkl.native._pack import NO_MEMORY, Plan, keep, known, plans, prepare

KL, WASSERSTEIN2 = 0, 1
POSTERIOR = 1  # reference.Stream.POSTERIOR
SCALES = {"logvar": 0, "log_std": 1, "std": 2, "softplus": 3}
INFINITY = float("inf")
# The dimensions of each tensor of a C function. The value that forward allocates is contiguous.
KINDS = {
    "forward": ("full", "full", "event", "event", "samples", "samples", "none"),
    "backward": ("full", "full", "event", "event", "samples", "value", "samples", "full", "full", "event", "event"),
}


class _Settings(NamedTuple):
    distance: int
    per_column: bool
    event_ndim: int
    scale: str
    low: float
    high: float
    live: bool
    num_samples: int | None = None
    stream: int = POSTERIOR


def make(name: str, settings: tuple, tensors: tuple) -> Plan | None:
    """The plan of a C function for these tensors; a missing one is None."""
    settings, mu, kinds = _Settings(*settings), tensors[0], KINDS[name]
    ndim, event_ndim = mu.dim(), settings.event_ndim
    strides, steps, samples, shared = [], [], 0, False
    for tensor, kind in zip(tensors, kinds, strict=True):
        own = (0,) * ndim if tensor is None or kind == "none" else tensor.stride()
        if kind == "samples":
            samples = 0 if tensor is None else settings.num_samples or 1  # the last one counts: z, or its gradient
            several = tensor is not None and settings.num_samples is not None
            step, own = (own[0], own[1:]) if several else (0, own)
            steps.append(step)
        elif kind == "event" or (kind == "value" and settings.per_column):  # may be shared by the batch
            shared |= kind == "event" and len(own) < ndim
            own = (*[0] * (ndim - len(own)), *own)
        elif kind == "value":
            own = (*own, *[0] * (ndim - len(own)))
        strides.append(own)
    bounded = settings.low > -INFINITY or settings.high < INFINITY
    numbers = [settings.distance, settings.per_column, SCALES[settings.scale], settings.distance == WASSERSTEIN2]
    numbers += [bounded, settings.live, samples, *steps, shared, settings.stream]
    result = mu.shape[ndim - event_ndim :] if settings.per_column else mu.shape[: ndim - event_ndim]
    more = {"low": settings.low, "high": settings.high, "result": result}
    return prepare("normal", name, numbers, mu.shape, event_ndim, tensors, strides, 1, **more)


# Python takes most of the time for small latents, so these two pass over their tensors once and call C directly.


def _value(distance: int, per_column: bool, mu, parameter, prior_mu, prior_logvar, *settings):
    """One value per row or column, or NotImplemented."""
    parts: list[Any] = [distance, per_column, settings]
    addresses = []
    for tensor in (mu, parameter, prior_mu, prior_logvar):
        parts += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
        addresses.append(0 if tensor is None else tensor.data_ptr())
    key = tuple(parts)
    try:
        plan = plans[key]
    except KeyError:
        tensors = (mu, parameter, prior_mu, prior_logvar, None, None, None)
        plan = keep(key, make("forward", (distance, per_column, *settings), tensors))
    if plan is None or (per_column and mu.numel() == 0):
        return NotImplemented
    value = mu.new_empty(plan.result, dtype=plan.dtype)
    if mu.numel() == 0:
        return value.zero_()
    packed = plan.pack(torch.get_num_threads(), 0, *addresses, 0, 0, value.data_ptr())
    if plan.function(plan.numbers, packed, plan.low, plan.high):
        raise MemoryError(NO_MEMORY)
    return value


def _gradients(settings: tuple, seed, inputs: tuple, incoming: tuple, outputs: tuple):
    """Write the outputs and return None, or return NotImplemented. `inputs` are mu, parameter, prior_mu, prior_logvar
    and eps; `incoming` are the gradients of the value and of z."""
    mu = inputs[0]
    if seed is not None and mu.dtype is torch.float64:
        return NotImplemented
    parts: list[Any] = ["backward", settings]
    addresses = []
    for tensor in (*inputs, *incoming, *outputs):
        parts += (None,) if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)
        addresses.append(0 if tensor is None else tensor.data_ptr())
    key = tuple(parts)
    try:
        plan = plans[key]
    except KeyError:
        plan = keep(key, make("backward", settings, (*inputs, *incoming, *outputs)))
    if plan is None:
        return NotImplemented
    if mu.numel() == 0:
        for output in outputs:
            if output is not None:
                output.zero_()
        return None
    packed = plan.pack(torch.get_num_threads(), 0 if seed is None else seed.data_ptr(), *addresses)
    if plan.function(plan.numbers, packed, plan.low, plan.high):
        raise MemoryError(NO_MEMORY)
    return None


def _samples(settings: tuple, mu, parameter, prior_mu, prior_logvar, eps, seed, *, with_value: bool):
    """(z, value), or NotImplemented. The value is None if it is not wanted."""
    if seed is not None and mu.dtype is torch.float64:
        return NotImplemented
    inputs, num_samples = (mu, parameter, prior_mu, prior_logvar, eps), settings[7]
    dtype = mu.dtype if mu.dtype is parameter.dtype else torch.promote_types(mu.dtype, parameter.dtype)
    if num_samples is None:
        z = torch.empty_like(mu, dtype=dtype)
    else:
        z = mu.new_empty((num_samples, *mu.shape), dtype=dtype)
    key = ("samples", settings, *known(inputs))
    try:
        plan = plans[key]
    except KeyError:
        plan = keep(key, make("forward", settings, (*inputs, z, None)))
    if plan is None:
        return NotImplemented
    value = mu.new_empty(plan.result, dtype=plan.dtype) if with_value else None
    if mu.numel() == 0:
        return z, None if value is None else value.zero_()
    plan.run(seed, *inputs, z, value)
    return z, value


kl_normal_fwd = functools.partial(_value, KL, False)
wasserstein2_normal_fwd = functools.partial(_value, WASSERSTEIN2, False)
kl_normal_per_dim_fwd = functools.partial(_value, KL, True)


def kl_normal_bwd(
    dkl, mu, parameter, prior_mu, prior_logvar, dmu, dparameter, dprior_mu, dprior_logvar, *settings
):  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar, None), (dmu, dparameter, dprior_mu, dprior_logvar)
    return _gradients((KL, False, *settings), None, inputs, (dkl, None), outputs)


def wasserstein2_normal_bwd(
    ddistance, mu, parameter, prior_mu, prior_logvar, dmu, dparameter, dprior_mu, dprior_logvar, *settings
):  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar, None), (dmu, dparameter, dprior_mu, dprior_logvar)
    return _gradients((WASSERSTEIN2, False, *settings), None, inputs, (ddistance, None), outputs)


def kl_normal_per_dim_bwd(
    dkl, mu, parameter, prior_mu, prior_logvar, dmu, dparameter, dprior_mu, dprior_logvar, event_ndim, *settings
):  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar, None), (dmu, dparameter, dprior_mu, dprior_logvar)
    share = dkl / max(1, mu.shape[: mu.dim() - event_ndim].numel())
    return _gradients((KL, True, event_ndim, *settings), None, inputs, (share, None), outputs)


def rsample_kl_fwd(mu, parameter, prior_mu, prior_logvar, eps, seed, *settings):
    return _samples((KL, False, *settings), mu, parameter, prior_mu, prior_logvar, eps, seed, with_value=True)


def rsample_kl_bwd(
    dz, dkl, mu, parameter, prior_mu, prior_logvar, eps, seed, dmu, dparameter, dprior_mu, dprior_logvar, *settings
):  # fmt: skip
    inputs, outputs = (mu, parameter, prior_mu, prior_logvar, eps), (dmu, dparameter, dprior_mu, dprior_logvar)
    return _gradients((KL, False, *settings), seed, inputs, (dkl, dz), outputs)


def rsample_normal_fwd(mu, parameter, eps, seed, event_ndim, *settings):
    settings = (KL, False, mu.dim(), *settings)  # one row, because nothing is summed
    found = _samples(settings, mu, parameter, None, None, eps, seed, with_value=False)
    return found if found is NotImplemented else found[0]


def rsample_normal_bwd(dz, mu, parameter, eps, seed, dmu, dparameter, event_ndim, *settings):
    inputs, outputs = (mu, parameter, None, None, eps), (dmu, dparameter, None, None)
    return _gradients((KL, False, mu.dim(), *settings), seed, inputs, (None, dz), outputs)
