"""Conversion of the scales that users give (std, var, ...) to log-variances, in torch ops before the op itself; and of
the tensors of torch.distributions to those that ops take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops._call import apply


class _Collapse(torch.autograd.Function):
    """Undo an expand(): keep one of the equal entries. Backward returns equal shares of the gradient, expanded, so
    that nothing of the full size is allocated; the backward pass of expand() sums them to the whole."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor, dims):
        return _first(tensor, dims).clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensor, ctx.dims = inputs
        ctx.shape = tensor.shape

    @staticmethod
    def backward(ctx, gradient):
        return (gradient / math.prod([ctx.shape[dim] for dim in ctx.dims])).expand(ctx.shape), None


def _first(tensor: Tensor, dims: list[int]) -> Tensor:
    """The first entry along each of `dims`, kept as dimensions of size 1."""
    return tensor[tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(tensor.dim()))]


def distinct(tensor: Tensor, dims: Iterable[int]) -> Tensor:
    """`tensor` with size 1 along those of `dims` that are expanded (stride 0)."""
    dims = [dim for dim in dims if tensor.stride(dim) == 0 and tensor.shape[dim] > 1]
    if dims and not tensor.requires_grad:
        return _first(tensor, dims)
    if dims and tensor.dtype != torch.float16 and (torch.compiler.is_compiling() or not tensor.is_leaf):
        return apply(_Collapse, tensor, dims)
    return tensor  # its own gradient is wanted per entry; equal shares of it may underflow in float16


class _ToLogvar(torch.autograd.Function):
    """reference.to_logvar with a safe gradient: its own is a difference, inf - inf if the incoming one overflowed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter, scale):
        # reference.to_logvar is three passes longer, for its derivative at infinity, which is in backward here.
        return parameter.log().mul_(2) if scale == "std" else reference.to_logvar(parameter, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, dlogvar):
        (parameter,) = ctx.saved_tensors
        return reference.to_parameter_gradient(dlogvar, parameter, ctx.scale), None


def as_logvar(name: str, parameter: Any, scale: str, *others: Tensor | None, bounds: Any = None) -> Any:
    """ln sigma^2, within the bounds, of `parameter`, which is what `scale` says; `name` is its argument's name.

    It has the dtype in which an op of the tensor and `others` computes: rounded to 16 bits, it would bias every
    density. An expanded tensor stays expanded, and its logarithm is taken once.
    """
    arguments.check_choice(name, scale, reference.SCALES)
    if parameter is None or (scale == "logvar" and bounds is None):
        return parameter
    own = distinct(parameter, range(parameter.dim())).to(reference.compute_dtype(parameter, *others))
    logvar = own if scale == "logvar" else apply(_ToLogvar, own, scale)
    return reference.bound(logvar, bounds).expand(parameter.shape)


def as_torch_takes(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as torch's arithmetic takes them together: integers become floats, and one without dimensions goes from
    the CPU to the others' device, and from float64 to float32 unless a larger one is float64."""
    devices = [t.device for t in tensors if t.device.type != "cpu"]
    larger = [t.dtype for t in tensors if t.dim() and t.is_floating_point()]

    def taken(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            t = t.to(torch.get_default_dtype())
        if t.dim() == 0 and larger and torch.float64 not in larger and t.dtype == torch.float64:
            t = t.float()
        if t.dim() == 0 and devices and t.device.type == "cpu":
            t = t + torch.zeros((), dtype=t.dtype, device=devices[0])  # unlike Tensor.to it waits for nothing
        return t

    return tuple(taken(t) for t in tensors)
