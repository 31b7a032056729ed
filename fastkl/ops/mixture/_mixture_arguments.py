"""Conversion of mixture arguments, as users give them, to the canonical form of the mixture ops and kernels.

z [R, D]; logits [I, K]; means [M, K, D]; logvars [m, k, d], each size full or 1; scale_tril [M, K, D, D]. Row r uses
logits[r % I] and means[r % M]; if M > 1, I and m are 1 or M.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops._scales import as_logvar, distinct

PRECISIONS = ("exact", "tf32x3", "tf32")
EVENTS = (1, 2, 2, 3)  # number of dimensions of one mixture's logits, means, logvars, scale_tril


def collapse(tensor: Tensor, event_ndim: int) -> Tensor:
    """`tensor` without leading batch dimensions along which it does not vary; other expanded batch dimensions (of
    stride 0) get size 1."""
    batch = tensor.dim() - event_ndim
    return _without_leading_ones(distinct(tensor, range(batch)), batch)


def _without_leading_ones(tensor: Tensor, batch: int) -> Tensor:
    ndim = 0
    while ndim < batch and tensor.shape[ndim] == 1:
        ndim += 1
    return tensor.reshape(tensor.shape[ndim:]) if ndim > 0 else tensor


def as_logvars(
    means: Tensor, logvars: Tensor | float | None, scale: str = "logvar", name: str = "scale"
) -> Tensor | None:
    """The components' log-variances, converted from what `scale` (the argument called `name`) says. A number applies to
    all components: [1], in the means' dtype."""
    (found,) = arguments.as_tensors(means, logvars)
    logvars = logvars if found is logvars else found.to(means.dtype).reshape(1)
    arguments.check_tensors(logvars=logvars)
    return as_logvar(name, logvars, scale, means)


def by_component(logvars: Tensor) -> Tensor:
    """logvars, with [D], shared by all components, as [1, D]."""
    return logvars if logvars.dim() > 1 else logvars.unsqueeze(0)


def check_precision(precision: str) -> str:
    return arguments.check_choice("precision", precision, PRECISIONS)


def canonical(
    z: dict[str, Tensor], logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None
) -> tuple[list[Tensor], tuple, torch.Size]:
    """(rows, each [R, D]; (logits, means, logvars, scale_tril); the batch shape, R in the caller's dimensions).

    `z` holds the tensors [..., D] by name: {"z": z}, or {"mu": mu, "logvar": logvar}. Rows keep the order of the batch;
    parameters that vary along other than its last dimensions are copied.
    """
    batch, mixture = _collapsed(z, logits, means, logvars, scale_tril)
    rows, mixture = _flattened(list(z.values()), mixture, batch)
    return rows, mixture, batch


def arranged(
    z: dict[str, Tensor], logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None
) -> tuple[list[Tensor], tuple, Callable[[Tensor], Tensor]]:
    """Like `canonical`, but with the batch's dimensions in the order that copies least, and instead of the batch shape
    a function that gives a result [R, ...] the caller's shape."""
    batch, mixture = _collapsed(z, logits, means, logvars, scale_tril)
    rows, order = list(z.values()), _order(len(z), mixture, batch)
    if order is not None:
        rows = [_permuted(tensor, order, 1) for tensor in rows]
        mixture = [
            None if tensor is None else _without_leading_ones(_permuted(tensor, order, event), len(order))
            for tensor, event in zip(mixture, EVENTS)
        ]
        batch = torch.Size([batch[dim] for dim in order])
    rows, mixture = _flattened(rows, mixture, batch)

    def restore(result: Tensor) -> Tensor:
        result = result.view((*batch, *result.shape[1:]))
        if order is None:
            return result
        back = sorted(range(len(order)), key=order.__getitem__)
        return result.permute((*back, *range(len(order), result.dim())))

    return rows, mixture, restore


def _collapsed(z: dict[str, Tensor], *parameters: Tensor | None) -> tuple[torch.Size, list[Tensor | None]]:
    """(the batch shape, the mixture's collapsed tensors), checked."""
    logits, means, logvars, scale_tril = parameters
    logvars = as_logvars(means, logvars)
    parameters = (logits, means, logvars, scale_tril)
    check_shapes(z, *parameters)
    if scale_tril is not None:
        check_triangles(scale_tril)
    logvars = None if logvars is None else by_component(logvars)
    mixture = [None if t is None else collapse(t, n) for t, n in zip((logits, means, logvars, scale_tril), EVENTS)]
    return batch_shape(z, *parameters), mixture


def _permuted(tensor: Tensor, order: list[int], event: int) -> Tensor:
    """[*batch, *event] with all of the batch's dimensions, permuted to `order`."""
    tensor = tensor.reshape(*[1] * (len(order) + event - tensor.dim()), *tensor.shape)
    return tensor.permute(*order, *range(len(order), len(order) + event))


def _order(row_tensors: int, mixture, batch: torch.Size) -> list[int] | None:
    """The order of the batch's dimensions with those last along which parameters vary, or None to keep the order.

    A new order means copying the rows. The old one means copying the parameters along every dimension after the first
    one along which they vary.
    """
    varies, size = set(), 0  # dimensions along which parameters vary, and their elements
    for tensor, event in zip(mixture, EVENTS):
        if tensor is not None and tensor.dim() > event:
            leading = tensor.shape[: tensor.dim() - event]
            varies |= {len(batch) - len(leading) + dim for dim, length in enumerate(leading) if length != 1}
            size += math.prod(tensor.shape[-event:])
    keys = [dim in varies for dim in range(len(batch)) if batch[dim] != 1]
    if keys == sorted(keys):
        return None
    more = math.prod(batch[min(varies) :]) - math.prod([batch[dim] for dim in varies])
    if row_tensors * math.prod(batch) * mixture[1].shape[-1] >= more * size:
        return None
    return sorted(range(len(batch)), key=varies.__contains__)


def _flattened(rows: list[Tensor], mixture, batch: torch.Size) -> tuple[list[Tensor], tuple]:
    """Flatten the batch's dimensions to one of rows, and those along which parameters vary to one of data."""
    dimensions = mixture[1].shape[-1]
    rows = [arguments.expand(tensor, (*batch, dimensions)).reshape(-1, dimensions) for tensor in rows]
    ndim = [0 if tensor is None else tensor.dim() - event for tensor, event in zip(mixture, EVENTS)]
    per_datum = max(ndim[1:]) > 0  # whether the components, not only the weights, differ by datum
    trailing = batch[len(batch) - max(ndim) :]
    flat = []
    for index, (tensor, count, event) in enumerate(zip(mixture, ndim, EVENTS)):
        if tensor is not None and (count > 0 or (per_datum and index in (1, 3))):
            tensor = arguments.expand(tensor, (*trailing, *tensor.shape[-event:])).reshape(-1, *tensor.shape[-event:])
        elif tensor is not None:
            tensor = tensor[None]
        flat.append(tensor)
    return rows, tuple(flat)


def batch_shape(z: dict[str, Tensor], logits, means, logvars, scale_tril) -> torch.Size:
    """The broadcast shape of all batch dimensions."""
    parameters = {"logits": (logits, 1), "means": (means, 2), "logvars": (logvars, 2), "scale_tril": (scale_tril, 3)}
    batches = {name: tensor[..., 0] for name, tensor in z.items()}
    for name, (tensor, event_ndim) in parameters.items():
        if tensor is not None and tensor.dim() > event_ndim:
            batches[name] = tensor[(..., *[0] * event_ndim)]
    return arguments.broadcast_shape(**batches) if batches else torch.Size()


def check_shapes(z: dict[str, Tensor], logits, means, logvars, scale_tril) -> None:
    arguments.check_tensors(**z, logits=logits, means=means, logvars=logvars, scale_tril=scale_tril)
    if logvars is not None and scale_tril is not None:
        raise ValueError("logvars and scale_tril exclude each other: both are the components' covariance")
    if means.dim() < 2 or 0 in means.shape[-2:]:
        raise ValueError(f"means must be (*batch, K, D) with K and D > 0, got {tuple(means.shape)}")
    count, dimensions = means.shape[-2:]
    for name, tensor in z.items():
        if tensor.dim() == 0 or tensor.shape[-1] != dimensions:
            raise ValueError(f"{name} must be (*batch, {dimensions}) as means {tuple(means.shape)} has it, "
                             f"got {tuple(tensor.shape)}")  # fmt: skip
    if logits.dim() == 0 or logits.shape[-1] != count:
        raise ValueError(f"logits must be (*batch, {count}), one for each component of means {tuple(means.shape)}, "
                         f"got {tuple(logits.shape)}")  # fmt: skip
    if logvars is not None:
        shape = (1, *logvars.shape)[-2:] if logvars.dim() else ()
        if not shape or shape[0] not in (1, count) or shape[1] not in (1, dimensions):
            raise ValueError(f"logvars must be (*batch, {count}, {dimensions}), ({count}, 1), (1, {dimensions}) or "
                             f"({dimensions},) for means {tuple(means.shape)}, got {tuple(logvars.shape)}")  # fmt: skip
    if scale_tril is not None and scale_tril.shape[-3:] != (count, dimensions, dimensions):
        raise ValueError(f"scale_tril must be (*batch, {count}, {dimensions}, {dimensions}) for means "
                         f"{tuple(means.shape)}, got {tuple(scale_tril.shape)}")  # fmt: skip


def check_triangles(scale_tril: Tensor) -> None:
    """Require a positive diagonal. Checked only if the values can be read without synchronising with a device."""
    if scale_tril.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = (scale_tril.detach().diagonal(dim1=-2, dim2=-1) <= 0).any(-1)
    if arguments.number_in(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"scale_tril must have a positive diagonal, but that of component {index} has not: its "
                         "covariance is singular")  # fmt: skip


def vmap_call(call, size: int, dims, rows, mixture) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The return value of a Function's vmap, by one call(rows, mixture) -> tensors [R, ...] for all examples."""
    mixture, data, per_datum = _vmap_mixture(mixture, dims[len(rows) : len(rows) + 4], size)
    rows = [None if t is None else _vmap_rows(t, dim, size, data, per_datum) for t, dim in zip(rows, dims)]
    outputs = call(rows, mixture)
    return tuple(_vmap_result(out, size, data, per_datum) for out in outputs), (0,) * len(outputs)


def _vmap_rows(tensor: Tensor, dim: int | None, size: int, data: int, per_datum: bool) -> Tensor:
    """Rows [R, ...] of each example as rows of one call: [examples, rows], or [samples, examples, data] if the mixture
    differs by example."""
    tensor = arguments.batch_first(tensor, dim, size)
    if per_datum:
        tensor = tensor.unflatten(1, (-1, data)).transpose(0, 1).flatten(1, 2)
    return tensor.flatten(0, 1)


def _vmap_result(tensor: Tensor, size: int, data: int, per_datum: bool) -> Tensor:
    """The inverse of _vmap_rows for a result [R', ...]: [examples, R, ...]."""
    if not per_datum:
        return tensor.unflatten(0, (size, -1))
    return tensor.unflatten(0, (-1, size, data)).transpose(0, 1).flatten(1, 2)


def _vmap_mixture(mixture, dims, size: int) -> tuple[list[Tensor | None], int, bool]:
    """(the mixture's tensors for all examples at once, data of each, whether parameters differ by example)."""
    per_datum = any(dim is not None for tensor, dim in zip(mixture, dims) if tensor is not None)
    lengths = [1 if t is None else t.shape[0 if dim is None or dim > 0 else 1] for t, dim in zip(mixture, dims)]
    data = max(lengths)
    if not per_datum:
        return list(mixture), data, False
    components_differ = any(dim is not None or length > 1 for dim, length in zip(dims[1:], lengths[1:]))
    batched = []
    for index, (tensor, dim, length) in enumerate(zip(mixture, dims, lengths)):
        if tensor is None:
            batched.append(None)
            continue
        must = components_differ and index in (1, 3)
        if dim is None and length == 1 and not must:
            batched.append(tensor)
            continue
        tensor = arguments.batch_first(tensor, dim, size)
        batched.append(arguments.expand(tensor, (size, data, *tensor.shape[2:])).flatten(0, 1))
    return batched, data, True
