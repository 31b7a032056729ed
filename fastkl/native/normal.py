"""Arguments of normal.c: kl_normal, kl_normal_per_dim, wasserstein2_normal, rsample_normal and rsample_kl.

float64 samples are drawn by the closed form, whose noise is bit-identical to the definition. The loop's noise equals it
up to float32 rounding, which would be visible in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastkl.native._pack import Plan, address, keep, known, plans, prepare

KL, WASSERSTEIN2 = 0, 1
POSTERIOR = 1  # reference.Stream.POSTERIOR
SCALES = {"logvar": 0, "log_std": 1, "std": 2, "softplus": 3}
INFINITY = float("inf")
# The positions of eps, and of z or its gradient, among a function's tensors; and the dimensions of each tensor after q.
SAMPLES = {"forward": (4, 5), "backward": (4, 6)}
KINDS = {
    "forward": ("event", "event", "samples", "samples", "none"),
    "backward": ("event", "event", "samples", "value", "samples", "full", "full", "event", "event"),
}


class _Settings(NamedTuple):
    distance: int
    per_column: bool
    num_samples: int | None
    packed_dim: int
    event_ndim: int
    scale: str
    low: float
    high: float
    live: bool
    stream: int = POSTERIOR


def make(name: str, settings: tuple, q, samples: int, others) -> Plan | None:
    """The plan of a C function. `others` are the tensors after mu and the parameter; a missing one is None."""
    settings = _Settings(*settings)
    ndim, event_ndim = q[0].dim(), settings.event_ndim
    mu = q[0] if len(q) == 2 else q[0].chunk(2, settings.packed_dim)[0]
    strides, steps, shared = [mu.stride(), q[-1].stride()], [0] * (2 + len(others)), False
    for index, (tensor, kind) in enumerate(zip(others, KINDS[name]), start=2):
        own = (0,) * ndim if tensor is None or kind == "none" else tensor.stride()
        if tensor is not None and kind == "samples" and settings.num_samples is not None:
            steps[index], own = own[0], own[1:]
        elif kind == "event" or (kind == "value" and settings.per_column):  # may be shared by the batch
            shared |= kind == "event" and len(own) < ndim
            own = (*[0] * (ndim - len(own)), *own)
        elif kind == "value":
            own = (*own, *[0] * (ndim - len(own)))
        strides.append(own)
    bounded = settings.low > -INFINITY or settings.high < INFINITY
    numbers = [settings.distance, settings.per_column, SCALES[settings.scale], settings.distance == WASSERSTEIN2]
    numbers += [bounded, settings.live, samples, *(steps[index] for index in SAMPLES[name]), shared, settings.stream]
    value = mu.shape[ndim - event_ndim :] if settings.per_column else mu.shape[: ndim - event_ndim]
    halves = (0, 0)
    if len(q) == 1:
        steps_of_dim = (mu.stride(settings.packed_dim), strides[7][settings.packed_dim] if name == "backward" else 0)
        halves = tuple(mu.shape[settings.packed_dim] * step * mu.itemsize for step in steps_of_dim)
    more = {"low": settings.low, "high": settings.high, "result": value, "halves": halves}
    return prepare("normal", name, numbers, mu.shape, event_ndim, (q[0], q[-1], *others), strides, 1, **more)


def _forward(settings: tuple, q, seed, eps, prior, with_z=False, with_value=True):
    """(z, value), each None if not wanted; or NotImplemented. settings are _Settings, as a plain tuple."""
    per_column, num_samples, packed_dim = settings[1:4]
    mu = q[0]
    if (per_column and mu.numel() == 0) or (seed is not None and mu.dtype is torch.float64):
        return NotImplemented
    pm, px = prior or (None, None)
    key = ("normal", settings, with_z, known(q), known((pm, px, eps)) if prior or eps is not None else None)
    z = None
    if with_z:
        half = mu if len(q) == 2 else mu.chunk(2, packed_dim)[0]
        dtype = mu.dtype if len(q) == 1 or q[1].dtype is mu.dtype else torch.promote_types(mu.dtype, q[1].dtype)
        if num_samples is None:
            z = torch.empty_like(half, dtype=dtype)
        else:
            z = mu.new_empty((num_samples, *half.shape), dtype=dtype)
    try:
        plan = plans[key]
    except KeyError:
        samples = (1 if num_samples is None else num_samples) if with_z else 0
        plan = keep(key, make("forward", settings, q, samples, (pm, px, eps, z, None)))
    if plan is None:
        return NotImplemented
    value = mu.new_empty(plan.result, dtype=plan.dtype) if with_value else None
    if mu.numel() == 0:
        return z, value.zero_() if with_value else None
    first = mu.data_ptr()
    second = q[1].data_ptr() if len(q) == 2 else first + plan.halves[0]
    plan.run(address(seed), first, second, address(pm), address(px), address(eps), address(z), address(value))
    return z, value


def _backward(settings: tuple, dz, dvalue, q, seed, eps, prior, prior_gradient=False):
    mu, packed = q[0], len(q) == 1
    if seed is not None and mu.dtype is torch.float64:
        return NotImplemented
    pm, px = prior or (None, None)
    key = ("normal backward", settings, prior_gradient, known(q), known((dvalue, dz)))
    if prior or eps is not None:
        key += known((pm, px, eps))
    gradients = [torch.empty_like(tensor) for tensor in q]
    dpm = dpx = None
    if prior and prior_gradient:
        if dvalue is None:
            return NotImplemented
        dpm, dpx = torch.empty_like(pm), torch.empty_like(px)
    try:
        plan = plans[key]
    except KeyError:
        dq = gradients[0].chunk(2, settings[3]) if packed else gradients
        samples = 0 if dz is None else 1 if settings[2] is None else settings[2]
        others = (pm, px, eps, dvalue, dz, *dq, dpm, dpx)
        plan = keep(key, make("backward", settings, q, samples, others))
    if plan is None:
        return NotImplemented
    if mu.numel() == 0:
        return [g.zero_() for g in (*gradients, dpm, dpx) if g is not None]
    first, dfirst = mu.data_ptr(), gradients[0].data_ptr()
    second = first + plan.halves[0] if packed else q[1].data_ptr()
    dsecond = dfirst + plan.halves[1] if packed else gradients[1].data_ptr()
    plan.run(
        address(seed), first, second, address(pm), address(px), address(eps), address(dvalue), address(dz),
        dfirst, dsecond, address(dpm), address(dpx),
    )  # fmt: skip
    return gradients if dpm is None else [*gradients, dpm, dpx]


def kl_normal_fwd(q, packed_dim, prior, event_ndim, scale, low, high, live):
    found = _forward((KL, False, None, packed_dim, event_ndim, scale, low, high, live), q, None, None, prior)
    return found if found is NotImplemented else found[1]


def kl_normal_bwd(dkl, q, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient):
    settings = (KL, False, None, packed_dim, event_ndim, scale, low, high, live)
    return _backward(settings, None, dkl, q, None, None, prior, prior_gradient)


def wasserstein2_normal_fwd(mu, parameter, prior, *settings):
    found = _forward((WASSERSTEIN2, False, None, -1, *settings), [mu, parameter], None, None, prior)
    return found if found is NotImplemented else found[1]


def wasserstein2_normal_bwd(dvalue, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient):
    settings = (WASSERSTEIN2, False, None, -1, event_ndim, scale, low, high, live)
    return _backward(settings, None, dvalue, [mu, parameter], None, None, prior, prior_gradient)


def kl_normal_per_dim_fwd(mu, parameter, prior, *settings):
    found = _forward((KL, True, None, -1, *settings), [mu, parameter], None, None, prior)
    return found if found is NotImplemented else found[1]


def kl_normal_per_dim_bwd(dkl, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient):
    rows = mu.shape[: mu.dim() - event_ndim].numel()
    settings = (KL, True, None, -1, event_ndim, scale, low, high, live)
    return _backward(settings, None, dkl / max(1, rows), [mu, parameter], None, None, prior, prior_gradient)


def rsample_kl_fwd(q, seed, eps, num_samples, packed_dim, prior, *settings):
    return _forward((KL, False, num_samples, packed_dim, *settings), q, seed, eps, prior, True)


def rsample_kl_bwd(
    dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient
):  # fmt: skip
    settings = (KL, False, num_samples, packed_dim, event_ndim, scale, low, high, live)
    return _backward(settings, dz, dkl, q, seed, eps, prior, prior_gradient)


def rsample_normal_fwd(q, seed, eps, num_samples, packed_dim, *settings):
    found = _forward((KL, False, num_samples, packed_dim, q[0].dim(), *settings), q, seed, eps, [], True, False)
    return found if found is NotImplemented else found[0]


def rsample_normal_bwd(dz, q, seed, eps, num_samples, packed_dim, *settings):
    return _backward((KL, False, num_samples, packed_dim, q[0].dim(), *settings), dz, None, q, seed, eps, [])
