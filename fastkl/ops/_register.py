"""The one place that talks to torch.library.

`register` gives an op its schema, a closed form in torch ops that runs on any device, a fake for tracing, and the
Triton implementation for CUDA (and ROCm) tensors, which is imported when the first such tensor arrives: a machine
without Triton never notices. Gradients are not registered here; each op wraps itself in an autograd.Function, which
costs about 60 us less per forward and backward than torch.library.register_autograd.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fastkl"

# Public name of each op -> its Triton implementation. Tests register these for CPU tensors as well, so that one suite
# drives the kernels through the interpreter.
TRITON: dict[str, Callable[..., Any]] = {}


def register(schema: str, *, closed_form: Callable[..., Any], fake: Callable[..., Any], kernel: str) -> Callable:
    """Define `fastkl::<schema>` and return the callable op.

    `kernel` names the Triton launcher as "module.function" inside fastkl.kernels; it takes the op's arguments, and
    returns NotImplemented for what it has no kernel for, which is the closed form's then.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    module, function = kernel.rsplit(".", 1)

    def triton_launch(*args: Any) -> Any:
        launcher = getattr(importlib.import_module(f"fastkl.kernels.{module}"), function)
        result = launcher(*args)
        return closed_form(*args) if result is NotImplemented else result

    TRITON[name] = triton_launch
    torch.library.define(qualified, schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", closed_form)
    torch.library.impl(qualified, "CUDA", triton_launch)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.fastkl, name).default


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a closed form that multiplies matrices, which autocast would do in 16 bits. The result is on its own tensors'
    device, the first argument that is one."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def needs_closed_form(*cotangents: torch.Tensor) -> bool:
    """Whether a backward pass must be plain differentiable torch ops instead of the fused op.

    That is so where the gradient is differentiated again (create_graph, torch.func) or batched (is_grads_batched):
    once_differentiable would not stop silently wrong second derivatives.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return any(functorch.is_batchedtensor(c) or functorch.is_legacy_batchedtensor(c) for c in cotangents)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args). In eager mode without torch.func, past Function.apply itself, which binds the signature of
    a Function with setup_context anew at every call: a third of the host time of a small loss.

    forward names each of its arguments: torch.compile without gradients takes *settings for one."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)
