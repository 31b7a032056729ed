"""Arguments of normal.c: kl_normal, kl_normal_per_dim, wasserstein2_normal, rsample_normal and rsample_kl."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastkl.native._pack import MOST_DIMS, call, function, halves

KL, WASSERSTEIN2 = 0, 1
SCALES = {"logvar": 0, "log_std": 1, "std": 2, "softplus": 3}
INFINITY = float("inf")


def _header(
    distance, per_column, scale, low, high, live, samples, eps_step, z_step, seed, event_ndim, shape
) -> list[int]:  # fmt: skip
    return [
        torch.get_num_threads(), distance, per_column, SCALES[scale], distance == WASSERSTEIN2,
        low > -INFINITY or high < INFINITY, live, samples, eps_step, z_step, 0 if seed is None else seed.data_ptr(),
        len(shape), event_ndim, *shape,
    ]  # fmt: skip


def _posterior(q, packed_dim):
    """(shape, numbers of mu and of the parameter)."""
    if len(q) == 2:
        mu, parameter = q
        return mu.shape, [mu.data_ptr(), *mu.stride(), parameter.data_ptr(), *parameter.stride()]
    shape, strides, first, second = halves(q[0], packed_dim)
    return shape, [first, *strides, second, *strides]


def _shared(tensors, ndim: int) -> list[int]:
    """Numbers of both tensors, or of none; they may lack the leading dimensions, which then have a stride of 0."""
    if not tensors:
        return [0] * (2 * ndim + 2)
    numbers = []
    for tensor in tensors:
        strides = tensor.stride()
        numbers += [tensor.data_ptr(), *[0] * (ndim - len(strides)), *strides]
    return numbers


def _samples(tensor, num_samples, ndim: int) -> tuple[list[int], int]:
    """(numbers of the first sample, step to the next) of [num_samples, *shape], or [*shape] without num_samples."""
    if tensor is None:
        return [0] * (ndim + 1), 0
    strides = tensor.stride()
    if num_samples is None:
        return [tensor.data_ptr(), *strides], 0
    return [tensor.data_ptr(), *strides[1:]], strides[0]


def _find(name: str, q, prior, *others) -> Callable | None:
    """The C function, where it takes these tensors. Loops, because a generator costs as much as the C code."""
    dtype = q[0].dtype
    if q[-1].dtype is not dtype or q[0].dim() > MOST_DIMS:
        return None
    for tensors in (prior, others):
        for tensor in tensors:
            if tensor is not None and tensor.dtype is not dtype:
                return None
    return function("normal", name, dtype)


def _forward(
    distance, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live, *,
    with_z=False, with_value=True, per_column=False,
):  # fmt: skip
    run = _find("forward", q, prior, eps)
    if run is None:
        return NotImplemented
    mu = q[0]
    shape, posterior = _posterior(q, packed_dim)
    ndim = len(shape)
    z = value = None
    if with_z:
        if num_samples is not None:
            z = mu.new_empty((num_samples, *shape))
        else:
            z = torch.empty_like(mu if len(q) == 2 else mu.chunk(2, packed_dim)[0])
    if with_value:
        value = mu.new_empty(shape[ndim - event_ndim :] if per_column else shape[: ndim - event_ndim])
    if 0 in shape:
        if per_column:
            return NotImplemented
        return z, value.zero_() if with_value else None
    samples = (1 if num_samples is None else num_samples) if with_z else 0
    eps_numbers, eps_step = _samples(eps, num_samples, ndim)
    z_numbers, z_step = _samples(z, num_samples, ndim)
    header = _header(
        distance, per_column, scale, low, high, live, samples, eps_step, z_step, seed, event_ndim, shape
    )  # fmt: skip
    value_numbers = [value.data_ptr() if with_value else 0, *[0] * ndim]
    call(run, [*header, *posterior, *_shared(prior, ndim), *eps_numbers, *z_numbers, *value_numbers], low, high)
    return z, value


def _backward(
    distance, dz, dvalue, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live, *,
    prior_gradient=False, per_column=False,
):  # fmt: skip
    run = _find("backward", q, prior, eps, dz, dvalue)
    if run is None:
        return NotImplemented
    gradients = [torch.empty_like(tensor) for tensor in q]
    shape, posterior = _posterior(q, packed_dim)
    ndim = len(shape)
    dq = _posterior(gradients, packed_dim)[1]
    wanted = prior_gradient and len(prior) > 0
    shared = wanted and prior[0].dim() < ndim
    if wanted:
        gradients += [torch.empty_like(tensor) for tensor in prior]
    if 0 in shape or (wanted and dvalue is None):
        return [gradient.zero_() for gradient in gradients] if 0 in shape else NotImplemented
    samples = 0 if dz is None else 1 if num_samples is None else num_samples
    eps_numbers, eps_step = _samples(eps, num_samples, ndim)
    dz_numbers, dz_step = _samples(dz, num_samples, ndim)
    if dvalue is None:
        value_numbers = [0] * (ndim + 1)
    elif per_column:
        value_numbers = [dvalue.data_ptr(), *[0] * (ndim - event_ndim), *dvalue.stride()]
    else:
        value_numbers = [dvalue.data_ptr(), *dvalue.stride(), *[0] * event_ndim]
    header = _header(
        distance, per_column, scale, low, high, live, samples, eps_step, dz_step, seed, event_ndim, shape
    )  # fmt: skip
    numbers = [*header, *posterior, *_shared(prior, ndim), *eps_numbers, *value_numbers, *dz_numbers, *dq]
    call(run, [*numbers, *_shared(gradients[len(q) :], ndim), shared], low, high)
    return gradients


def kl_normal_fwd(q, packed_dim, prior, event_ndim, scale, low, high, live):
    found = _forward(KL, q, None, None, None, packed_dim, prior, event_ndim, scale, low, high, live)
    return found if found is NotImplemented else found[1]


def kl_normal_bwd(dkl, q, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient):
    settings = (packed_dim, prior, event_ndim, scale, low, high, live)
    return _backward(KL, None, dkl, q, None, None, None, *settings, prior_gradient=prior_gradient)


def wasserstein2_normal_fwd(mu, parameter, prior, event_ndim, scale, low, high, live):
    settings = (-1, prior, event_ndim, scale, low, high, live)
    found = _forward(WASSERSTEIN2, [mu, parameter], None, None, None, *settings)
    return found if found is NotImplemented else found[1]


def wasserstein2_normal_bwd(dvalue, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient):
    settings = (-1, prior, event_ndim, scale, low, high, live)
    inputs = (None, dvalue, [mu, parameter], None, None, None)
    return _backward(WASSERSTEIN2, *inputs, *settings, prior_gradient=prior_gradient)


def kl_normal_per_dim_fwd(mu, parameter, prior, event_ndim, scale, low, high, live):
    settings = (-1, prior, event_ndim, scale, low, high, live)
    found = _forward(KL, [mu, parameter], None, None, None, *settings, per_column=True)
    return found if found is NotImplemented else found[1]


def kl_normal_per_dim_bwd(dkl, mu, parameter, prior, event_ndim, scale, low, high, live, prior_gradient):
    rows = mu.shape[: mu.dim() - event_ndim].numel()
    settings = (-1, prior, event_ndim, scale, low, high, live)
    inputs = (None, dkl / max(1, rows), [mu, parameter], None, None, None)
    return _backward(KL, *inputs, *settings, prior_gradient=prior_gradient, per_column=True)


def rsample_kl_fwd(q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live):
    settings = (packed_dim, prior, event_ndim, scale, low, high, live)
    return _forward(KL, q, seed, eps, num_samples, *settings, with_z=True)


def rsample_kl_bwd(
    dz, dkl, q, seed, eps, num_samples, packed_dim, prior, event_ndim, scale, low, high, live, prior_gradient
):  # fmt: skip
    settings = (packed_dim, prior, event_ndim, scale, low, high, live)
    return _backward(KL, dz, dkl, q, seed, eps, num_samples, *settings, prior_gradient=prior_gradient)


def rsample_normal_fwd(q, seed, eps, num_samples, packed_dim, scale, low, high, live):
    settings = (packed_dim, [], q[0].dim(), scale, low, high, live)
    found = _forward(KL, q, seed, eps, num_samples, *settings, with_z=True, with_value=False)
    return found if found is NotImplemented else found[0]


def rsample_normal_bwd(dz, q, seed, eps, num_samples, packed_dim, scale, low, high, live):
    settings = (packed_dim, [], q[0].dim(), scale, low, high, live)
    return _backward(KL, dz, None, q, seed, eps, num_samples, *settings)
