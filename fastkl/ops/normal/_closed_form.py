"""Sampling, KL and their gradients in torch ops: for tensors without a kernel, and for second derivatives.

Five ops share these formulas; tests compare them with autograd of the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments


def bounds_of(settings) -> reference.SoftBounds | tuple[float, float] | None:
    """The user's `bounds`, rebuilt from an op's settings (fastkl.ops.normal._normal)."""
    return arguments.as_bounds(settings.low, settings.high, settings.live)


def by_rows(definition: Callable[..., Tensor], inputs: Sequence[Any], settings) -> Tensor:
    """One value per row of a definition with these settings, computed in blocks of rows."""
    mu, *_ = inputs
    named = {"event_ndim": settings.event_ndim, "scale": settings.scale, "bounds": bounds_of(settings)}
    return arguments.by_rows(lambda *rows: definition(*rows, **named), mu, settings.event_ndim, inputs)


def samples_dtype(mu: Tensor | float | None, parameter: Tensor | float | None) -> torch.dtype:
    """The dtype of z: that of the parameters as given, even if a broadcast one is passed to the op in float32. Numbers
    do not count."""
    first, *second = (given.dtype for given in (mu, parameter) if isinstance(given, Tensor))
    return torch.promote_types(first, second[0]) if second else first


def empty_samples(mu: Tensor, parameter: Tensor, num_samples: int | None) -> Tensor:
    """z in the parameters' dtype, [*shape] in mu's memory layout, or [num_samples, *shape]."""
    dtype = samples_dtype(mu, parameter)
    if num_samples is None:
        return torch.empty_like(mu, dtype=dtype)
    return mu.new_empty((num_samples, *mu.shape), dtype=dtype)


def sample(mu: Tensor, parameter: Tensor, eps: Tensor, settings) -> Tensor:
    """mu + sigma eps, computed in blocks of rows."""
    z = empty_samples(mu, parameter, settings.num_samples)
    named = {"num_samples": settings.num_samples, "scale": settings.scale, "bounds": bounds_of(settings)}
    for rows in arguments.row_blocks(mu):
        target, *block, noise = (arguments.rows_of(tensor, rows, mu) for tensor in (z, mu, parameter, eps))
        target.copy_(reference.rsample_normal(*block, eps=noise, **named))
    return z


def normal_gradients(
    inputs: Sequence[Tensor | None], scale: str, bounds, *, dvalue: Tensor | None = None, dz: Tensor | None = None,
    eps: Tensor | None = None, terms_gradient: Callable[..., tuple[Tensor, ...]] = reference.kl_terms_gradient,
) -> list[Tensor]:  # fmt: skip
    """One gradient for each of the inputs mu, parameter, prior_mu and prior_logvar that is not None, in its dtype.

    dvalue broadcasts with mu: the incoming gradient of every element's KL, or of another divergence whose gradient is
    `terms_gradient`. dz is the incoming gradient of mu + sigma eps, of eps's shape. At least one of them is given.
    """
    given = [tensor for tensor in inputs if tensor is not None]
    found = _element_gradients(given, scale, bounds, terms_gradient, dvalue, dz, eps)
    shared = [gradient.sum_to_size(tensor.shape) for gradient, tensor in zip(found[2:], given[2:])]
    return [gradient.to(tensor.dtype) for gradient, tensor in zip([*found[:2], *shared], given)]


def _element_gradients(inputs, scale, bounds, terms_gradient, dvalue, dz, eps):
    """Gradients in mu, the parameter and the prior's two tensors, each of mu's shape."""
    dtype = reference.compute_dtype(*inputs)
    mu, parameter, *prior = (tensor.to(dtype) for tensor in inputs)
    if terms_gradient is reference.wasserstein2_terms_gradient:  # also finite for a point
        parameter = reference.above_zero(parameter, scale)
    raw = reference.to_logvar(parameter, scale)
    logvar = reference.bound(raw, bounds)
    dmu = dlogvar = None
    dprior = []
    if dvalue is not None:
        weight = dvalue.to(dtype)
        dmu, dlogvar, *dprior = (reference.weighted(weight, each) for each in terms_gradient(mu, logvar, *prior))
    if dz is not None:
        dz, eps = dz.to(dtype), eps.to(dtype)
        dsigma = dz * eps
        if dz.dim() > mu.dim():
            dz, dsigma = dz.sum(0), dsigma.sum(0)
        dlogvar_z = reference.weighted(dsigma, 0.5 * torch.exp(0.5 * logvar))
        dmu, dlogvar = (dz, dlogvar_z) if dvalue is None else (dmu + dz, dlogvar + dlogvar_z)
    dparameter = reference.to_parameter_gradient(dlogvar, parameter, scale)
    dparameter = reference.bound_gradient(dparameter, raw, bounds)  # last: outside the bounds 0 * inf must be 0
    return [dmu, dparameter, *dprior]


def write_normal_gradients(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], settings, *, dvalue: Tensor | None = None,
    dz: Tensor | None = None, eps: Tensor | None = None,
    terms_gradient: Callable[..., tuple[Tensor, ...]] = reference.kl_terms_gradient,
) -> None:  # fmt: skip
    """Like normal_gradients, but not differentiable: writes each block of rows straight into `outputs`.

    A block's temporaries stay in the CPU cache, and nothing else of the tensors' size is allocated. An unwanted output
    is None.
    """
    given = [tensor for tensor in inputs if tensor is not None]
    wanted = [tensor for tensor in outputs if tensor is not None]
    mu, dprior = given[0], wanted[2:]
    shared = bool(dprior) and dprior[0].dim() < mu.dim()
    totals = [torch.zeros_like(output, dtype=reference.compute_dtype(*given)) for output in dprior if shared]
    for rows in arguments.row_blocks(mu):
        block = [arguments.rows_of(tensor, rows, mu) for tensor in given]
        incoming = [arguments.rows_of(tensor, rows, mu) for tensor in (dvalue, dz, eps)]
        found = _element_gradients(block, settings.scale, bounds_of(settings), terms_gradient, *incoming)
        for output, gradient in zip(wanted[: 2 if shared else 4], found):
            arguments.rows_of(output, rows, mu).copy_(gradient)
        for total, gradient in zip(totals, found[2:]):
            total += gradient.sum_to_size(total.shape)
    for output, total in zip(dprior, totals):
        output.copy_(total)
