"""Sampling and KL in torch ops: for tensors without kernels, and for gradients that are differentiated again.

One formula for the four ops that share it; tests hold it against autograd of the definition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments


def unpack(q: list[Tensor], packed_dim: int) -> list[Tensor]:
    """[mu, parameter] from [mu, parameter], or from [head] that packs both along packed_dim."""
    return q if len(q) == 2 else list(q[0].chunk(2, packed_dim))


def kl_per_sample(q, packed_dim, prior, event_ndim, scale, bounds) -> Tensor:
    """reference.kl_normal, block of rows by block of rows."""
    settings = {"event_ndim": event_ndim, "scale": scale, "bounds": bounds}
    mu, parameter = unpack(q, packed_dim)
    tensors = [mu, parameter, *prior]
    return arguments.by_rows(lambda *rows: reference.kl_normal(*rows, **settings), mu, event_ndim, tensors)


def samples_dtype(mu: Tensor | float | None, parameter: Tensor | float | None) -> torch.dtype:
    """That of z: the parameters' own, also where one that is broadcast goes to the op in float32. A number has none."""
    first, *second = (given.dtype for given in (mu, parameter) if isinstance(given, Tensor))
    return torch.promote_types(first, second[0]) if second else first


def empty_samples(q, packed_dim, num_samples) -> Tensor:
    """z in the parameters' dtype, [*shape] in mu's memory layout, or [num_samples, *shape]."""
    mu, parameter = unpack(q, packed_dim)
    dtype = samples_dtype(mu, parameter)
    if num_samples is None:
        return torch.empty_like(mu, dtype=dtype)
    return mu.new_empty((num_samples, *mu.shape), dtype=dtype)


def sample(q, packed_dim, eps, num_samples, scale, bounds) -> Tensor:
    """mu + sigma eps, block of rows by block of rows."""
    mu, parameter = unpack(q, packed_dim)
    z = empty_samples(q, packed_dim, num_samples)
    for rows in arguments.row_blocks(mu):
        target, *block, noise = (arguments.rows_of(tensor, rows, mu) for tensor in (z, mu, parameter, eps))
        target.copy_(reference.rsample_normal(*block, eps=noise, num_samples=num_samples, scale=scale, bounds=bounds))
    return z


def normal_gradients(
    q: list[Tensor], packed_dim: int, prior: list[Tensor], scale: str, bounds, *,
    dkl: Tensor | None = None, dz: Tensor | None = None, eps: Tensor | None = None,
    terms_gradient: Callable[..., tuple[Tensor, ...]] = reference.kl_terms_gradient,
) -> list[Tensor]:  # fmt: skip
    """One gradient for each tensor of q and prior, in its dtype.

    dkl broadcasts with mu: the gradient of every element's KL, or of what has `terms_gradient` as its own. dz is the
    gradient of mu + sigma eps, [L, *shape] where eps is, else [*shape]. At least one of the two is there.
    """
    inputs = [*unpack(q, packed_dim), *prior]
    incoming = {"dkl": dkl, "dz": dz, "eps": eps, "terms_gradient": terms_gradient}
    gradients = _element_gradients(*inputs, scale=scale, bounds=bounds, **incoming)
    dq = gradients[:2] if len(q) == 2 else [torch.cat(gradients[:2], packed_dim)]
    dprior = [gradient.sum_to_size(tensor.shape) for gradient, tensor in zip(gradients[2:], prior)]
    return [gradient.to(tensor.dtype) for gradient, tensor in zip(dq + dprior, [*q, *prior])]


def _element_gradients(*inputs: Tensor, scale: str, bounds, dkl, dz, eps, terms_gradient) -> list[Tensor]:
    """In mu, the parameter and the prior's two tensors, each of mu's shape."""
    dtype = reference.compute_dtype(*inputs)
    mu, parameter, *prior = (tensor.to(dtype) for tensor in inputs)
    raw = reference.to_logvar(parameter, scale)
    logvar = reference.bound(raw, bounds)
    dmu = dlogvar = None
    dprior: list[Tensor] = []
    if dkl is not None:
        dkl = dkl.to(dtype)
        dmu, dlogvar, *dprior = (reference.weighted(dkl, gradient) for gradient in terms_gradient(mu, logvar, *prior))
    if dz is not None:
        dz, eps = dz.to(dtype), eps.to(dtype)
        dsigma = dz * eps
        if dz.dim() > mu.dim():
            dz, dsigma = dz.sum(0), dsigma.sum(0)
        dlogvar_z = reference.weighted(dsigma, 0.5 * torch.exp(0.5 * logvar))
        dmu, dlogvar = (dz, dlogvar_z) if dkl is None else (dmu + dz, dlogvar + dlogvar_z)
    dparameter = reference.to_parameter_gradient(dlogvar, parameter, scale)
    dparameter = reference.bound_gradient(dparameter, raw, bounds)  # last: outside, 0 times infinity must be 0
    return [dmu, dparameter, *dprior]


def fill_normal_gradients(
    q: list[Tensor], packed_dim: int, prior: list[Tensor], scale: str, bounds, *,
    dkl: Tensor | None = None, dz: Tensor | None = None, eps: Tensor | None = None, prior_gradient: bool = False,
    terms_gradient: Callable[..., tuple[Tensor, ...]] = reference.kl_terms_gradient,
) -> list[Tensor]:  # fmt: skip
    """normal_gradients for an op's own backward: nothing differentiable, written once, block of rows by block of rows.

    The temporaries of a block stay in the processor's cache, and no other memory of the tensors' size is touched.
    """
    mu, parameter = unpack(q, packed_dim)
    gradients = [torch.empty_like(tensor) for tensor in (*q, *(prior if prior_gradient else ()))]
    outputs = [*unpack(gradients[: len(q)], packed_dim), *gradients[len(q) :]]
    shared = prior_gradient and prior and prior[0].dim() < mu.dim()
    totals = [torch.zeros_like(p, dtype=reference.compute_dtype(mu, parameter, *prior)) for p in prior if shared]
    for rows in arguments.row_blocks(mu) if packed_dim != 0 else [arguments.EVERYTHING]:
        blocks = [arguments.rows_of(tensor, rows, mu) for tensor in (mu, parameter, *prior)]
        incoming = {name: arguments.rows_of(t, rows, mu) for name, t in (("dkl", dkl), ("dz", dz), ("eps", eps))}
        incoming["terms_gradient"] = terms_gradient
        found = _element_gradients(*blocks, scale=scale, bounds=bounds, **incoming)
        for output, gradient in zip(outputs[: 2 if shared else 4], found):
            arguments.rows_of(output, rows, mu).copy_(gradient)
        for total, gradient in zip(totals, found[2:]):
            total += gradient.sum_to_size(total.shape)
    for gradient, total in zip(gradients[len(q) :], totals):
        gradient.copy_(total)
    return gradients
