"""Conversion of mixture arguments, as users give them, to the canonical form of _mixture.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments
from fastkl.ops._scales import as_logvar, distinct
from fastkl.ops.mixture._mixture import Mixture

PRECISIONS = ("exact", "tf32x3", "tf32")
EVENTS = (1, 2, 2, 3)  # number of dimensions of one mixture's logits, means, logvars, scale_tril


def collapse(tensor: Tensor, event_ndim: int) -> Tensor:
    """`tensor` without leading batch dimensions along which it does not vary; other expanded batch dimensions (of
    stride 0) get size 1."""
    batch = tensor.dim() - event_ndim
    return _without_leading_ones(distinct(tensor, range(batch)), batch) if batch else tensor


def _without_leading_ones(tensor: Tensor, batch: int) -> Tensor:
    ndim = 0
    while ndim < batch and tensor.shape[ndim] == 1:
        ndim += 1
    return tensor.reshape(tensor.shape[ndim:]) if ndim > 0 else tensor


def as_logvars(
    means: Tensor, logvars: Tensor | float | None, scale: str = "logvar", name: str = "scale"
) -> Tensor | None:
    """The components' log-variances, converted from the kind `scale`, which is the argument `name`. A number applies to
    all components: [1], in the means' dtype."""
    found: Any = logvars
    if logvars is not None and not isinstance(logvars, Tensor):
        (found,) = arguments.as_tensors(means, logvars)
        found = found.to(means.dtype).reshape(1) if isinstance(found, Tensor) else found
    if scale != "logvar":  # else check_shapes does
        arguments.check_tensors(logvars=found)
    return as_logvar(name, found, scale, means)


def by_component(logvars: Tensor) -> Tensor:
    """logvars, with [D], shared by all components, as [1, D]."""
    return logvars if logvars.dim() > 1 else logvars.unsqueeze(0)


class Canonical(NamedTuple):
    """Arguments in canonical form, and the batch's dimensions that their rows are made of."""

    rows: list[Tensor]  # each [R, D]
    mixture: Mixture
    batch: torch.Size
    order: list[int] | None  # the place of each of these dimensions in the caller's batch; None if they are in order

    def restore(self, result: Tensor) -> Tensor:
        """A result [R, ...] in the caller's shape."""
        if len(self.batch) != 1:
            result = result.view((*self.batch, *result.shape[1:]))
        if self.order is None:
            return result
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return result.permute((*back, *range(len(self.order), result.dim())))


def canonical(
    z: dict[str, Tensor], logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None, *,
    reorder: bool = True,
) -> Canonical:  # fmt: skip
    """Checked and flattened arguments. `z` holds tensors [..., D] by name: {"z": z}, or {"mu": mu, "logvar": logvar}.

    With `reorder` the batch's dimensions are in the order that copies least. Else rows keep the order of the batch, and
    parameters that vary along other than its last dimensions are copied.
    """
    check_shapes(z, logits, means, logvars, scale_tril)
    if scale_tril is not None:
        check_triangles(scale_tril)
    batch = batch_shape(z, logits, means, logvars, scale_tril)
    logvars = None if logvars is None else by_component(logvars)
    given = (logits, means, logvars, scale_tril)
    mixture = [None if t is None else collapse(t, event) for t, event in zip(given, EVENTS)]
    rows, order = list(z.values()), _order(len(z), mixture, batch) if reorder else None
    if order is not None:
        rows = [_permuted(tensor, order, 1) for tensor in rows]
        mixture = [
            None if tensor is None else _without_leading_ones(_permuted(tensor, order, event), len(order))
            for tensor, event in zip(mixture, EVENTS)
        ]
        batch = torch.Size([batch[dim] for dim in order])
    return Canonical(*_flattened(rows, mixture, batch), batch, order)


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


def _flattened(rows: list[Tensor], mixture, batch: torch.Size) -> tuple[list[Tensor], Mixture]:
    """Flatten the batch's dimensions to one of rows, and those along which parameters vary to one of data."""
    dimensions = mixture[1].shape[-1]
    rows = [arguments.expand(tensor, (*batch, dimensions)) for tensor in rows]
    if len(batch) != 1:
        rows = [tensor.reshape(-1, dimensions) for tensor in rows]
    ndim = [0 if tensor is None else tensor.dim() - event for tensor, event in zip(mixture, EVENTS)]
    per_datum = max(ndim[1:]) > 0  # whether the components, not only the weights, differ by datum
    trailing = batch[len(batch) - max(ndim) :]
    flat = []
    for index, (tensor, count, event) in enumerate(zip(mixture, ndim, EVENTS)):
        if tensor is not None and (count > 0 or (per_datum and index in (1, 3))):
            own = tensor.shape[-event:]
            tensor = arguments.expand(tensor, (*trailing, *own)).reshape(-1, *own)
        elif tensor is not None:
            tensor = tensor.unsqueeze(0)
        flat.append(tensor)
    return rows, Mixture(*flat)


def batch_shape(z: dict[str, Tensor], logits, means, logvars, scale_tril) -> torch.Size:
    """The broadcast shape of all batch dimensions."""
    shapes = {name: tensor.shape[:-1] for name, tensor in z.items()}
    given = {"logits": logits, "means": means, "logvars": logvars, "scale_tril": scale_tril}
    for (name, tensor), event in zip(given.items(), EVENTS):
        if tensor is not None and tensor.dim() > event:
            shapes[name] = tensor.shape[: tensor.dim() - event]
    return arguments.common_shape(shapes) if shapes else torch.Size()


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
