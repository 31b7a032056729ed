"""Mixture arguments, as users write them, brought to the one form that the mixture ops and kernels take.

z [R, D]; logits [I, K]; means [M, K, D]; logvars [m, k, d], each size full or 1; scale_tril [M, K, D, D]. Row r uses
logits[r % I] and means[r % M]; where M > 1, I and m are 1 or M.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.ops import _arguments as arguments

PRECISIONS = ("exact", "tf32x3", "tf32")


class Canonical(NamedTuple):
    rows: list[Tensor]  # each [R, D]
    mixture: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # logits, means, logvars, scale_tril
    batch: torch.Size  # R in the caller's dimensions


class _Collapse(torch.autograd.Function):
    """One of the equal entries of an expanded tensor. The gradient is handed back expanded as well: none of its memory
    is touched on its way to the tensor that was expanded, where the equal shares sum to the whole."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, ndim):
        return tensor[(0,) * ndim].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensor, ctx.ndim = inputs
        ctx.shape = tensor.shape

    @staticmethod
    def backward(ctx, gradient):
        return (gradient / ctx.shape[: ctx.ndim].numel()).expand(ctx.shape), None


def collapse(tensor: Tensor, event_ndim: int) -> Tensor:
    """`tensor` without those leading dimensions along which it does not vary: of size 1, or expanded (stride 0)."""
    batch = tensor.dim() - event_ndim
    ndim = 0
    while ndim < batch and (tensor.shape[ndim] == 1 or (tensor.stride(ndim) == 0 and tensor.shape[ndim] > 0)):
        ndim += 1
    if ndim == 0:
        return tensor
    if all(size == 1 for size in tensor.shape[:ndim]):
        return tensor.reshape(tensor.shape[ndim:])
    if tensor.requires_grad and (
        tensor.dtype == torch.float16 or (not torch.compiler.is_compiling() and tensor.is_leaf)
    ):
        return tensor  # its own gradient is asked for, entry by entry; equal shares of one may be too small for float16
    return _Collapse.apply(tensor, ndim) if tensor.requires_grad else tensor[(0,) * ndim]


def check_precision(precision: str) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    return precision


def canonical(
    z: dict[str, Tensor], logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None
) -> Canonical:
    """`z` names the tensors [..., D] that have a row each: {"z": z}, or {"mu": mu, "logvar": logvar}."""
    check_shapes(z, logits, means, logvars, scale_tril)
    if scale_tril is not None:
        check_triangles(scale_tril)
    batch = batch_shape(z, logits, means, logvars, scale_tril)
    dimensions = means.shape[-1]
    rows = [arguments.expand(tensor, (*batch, dimensions)).reshape(-1, dimensions) for tensor in z.values()]
    if logvars is not None and logvars.dim() == 1:
        logvars = logvars[None]
    events = (1, 2, 2, 3)
    varying = [None if t is None else collapse(t, n) for t, n in zip((logits, means, logvars, scale_tril), events)]
    ndim = [0 if tensor is None else tensor.dim() - event for tensor, event in zip(varying, events)]
    per_datum = max(ndim[1:]) > 0  # whether the components, and not the weights alone, differ by datum
    trailing = batch[len(batch) - max(ndim) :]
    mixture = []
    for index, (tensor, count, event) in enumerate(zip(varying, ndim, events)):
        if tensor is not None and (count > 0 or (per_datum and index in (1, 3))):
            tensor = arguments.expand(tensor, (*trailing, *tensor.shape[-event:])).reshape(-1, *tensor.shape[-event:])
        elif tensor is not None:
            tensor = tensor[None]
        mixture.append(tensor)
    return Canonical(rows, tuple(mixture), batch)


def batch_shape(z: dict[str, Tensor], logits, means, logvars, scale_tril) -> torch.Size:
    """What the dimensions before the events of all of them broadcast to."""
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
    """A positive diagonal, where looking costs no wait for a device and is possible at all."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if scale_tril.device.type == "cpu" and not transformed:
        bad = (scale_tril.detach().diagonal(dim1=-2, dim2=-1) <= 0).any(-1)
        if bad.any():
            index = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"scale_tril must have a positive diagonal, but that of component {index} has not: its "
                             "covariance is singular")  # fmt: skip


def vmap_rows(tensor: Tensor, dim: int | None, size: int, data: int, per_datum: bool) -> Tensor:
    """Rows [R, ...] of each example as rows of one call: examples by rows, or, where the mixture's parameters differ by
    example, samples by examples by data."""
    tensor = arguments.batch_first(tensor, dim, size)
    if per_datum:
        tensor = tensor.unflatten(1, (-1, data)).transpose(0, 1).flatten(1, 2)
    return tensor.flatten(0, 1)


def vmap_result(tensor: Tensor, size: int, data: int, per_datum: bool) -> Tensor:
    """The inverse of vmap_rows for a result [R', ...]: [examples, R, ...]."""
    if not per_datum:
        return tensor.unflatten(0, (size, -1))
    return tensor.unflatten(0, (-1, size, data)).transpose(0, 1).flatten(1, 2)


def vmap_mixture(mixture, dims, size: int) -> tuple[list[Tensor | None], int, bool]:
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
        batched.append(tensor.expand(size, data, *tensor.shape[2:]).flatten(0, 1))
    return batched, data, True
