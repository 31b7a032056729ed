"""The only module that uses torch.library.

`register` gives an op its schema, a closed form in torch ops that runs on any device, a fake for tracing, the Triton
implementation for CUDA (and ROCm) tensors, and, if there is one, the native loop for CPU tensors. The last two are
imported at the first such tensor, so a machine without Triton or a C compiler works too.
Each op is called through an autograd.Function (`_call.apply`), which costs about 60 us less per forward and backward
pass than torch.library.register_autograd. `differentiable` registers the same gradient with torch as well, because an
exported program contains only the op, without the Function.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl.ops._call import CLOSED_FORM, CPU, NATIVE, TRITON, direct, run
from fastkl.ops._forward_mode import Context

NAMESPACE = "fastkl"
# A function that imports an implementation and returns it.
Loader = Callable[[], Callable[..., Any]]
# Name of each op -> how its Triton launcher is imported, and its loop in C if it has one.
LOADERS: dict[str, tuple[Loader, Loader | None]] = {}


def register(
    schema: str, *, closed_form: Callable[..., Any], fake: Callable[..., Any] | None = None, kernel: Loader,
    native: Loader | None = None, terms: Callable[..., float] | None = None,
) -> Callable:  # fmt: skip
    """Define `fastkl::<schema>` and return the callable op.

    `kernel` imports the Triton launcher, and `native` the loop in C. Both take the op's arguments, and may return
    NotImplemented to fall back on the closed form. An op that only writes into given outputs needs no fake. `terms`
    counts the terms of a call, and small calls are compiled as their closed form on a CPU (`_fused.is_fused`).
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"
    CLOSED_FORM[name] = CPU[name] = closed_form
    LOADERS[name] = kernel, native
    TRITON[name] = _lazily(name, kernel)
    if native is not None:
        NATIVE[name] = CPU[name] = _lazily(name, native)
    torch.library.define(qualified, schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", closed_form)
    torch.library.impl(qualified, "CPU", functools.partial(run, CPU, name))
    torch.library.impl(qualified, "CUDA", functools.partial(run, TRITON, name))
    torch.library.register_fake(qualified, fake or _nothing)
    return direct(name, getattr(torch.ops.fastkl, name).default, terms)


def _nothing(*args: Any) -> None:
    """The fake of an op that returns nothing and writes into given outputs."""


def differentiable(name: str, function: type[torch.autograd.Function], inputs_of: Callable[..., tuple]) -> None:
    """Give the op `name` the gradient of its Function, whose inputs are inputs_of(*the op's arguments)."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        function.setup_context(ctx, inputs_of(*inputs), tuple(output) if isinstance(output, list) else output)
        lists = [isinstance(arg, (list, tuple)) and all(isinstance(item, Tensor) for item in arg) for arg in inputs]
        # The path of each argument's gradient: (argument,), or for a list of tensors [(argument, index), ...].
        ctx.places = [
            [(number, place) for place in range(len(arg))] if is_list else (number,)
            for number, (arg, is_list) in enumerate(zip(inputs, lists))
        ]

    def backward(ctx: Any, *gradients: Any) -> tuple:
        if isinstance(gradients[0], (list, tuple)):  # the op returns a list
            gradients = tuple(gradients[0])
        # Inputs of the Function that are not arguments of the op, such as settings, have no place.
        places = [place if type(place) is tuple else None for place in inputs_of(*ctx.places)]
        wanted = [place is not None and bool(_at(ctx.needs_input_grad, place)) for place in places]
        own = Context(**vars(ctx), saved_tensors=ctx.saved_tensors, needs_input_grad=tuple(wanted))
        found: list[Any] = [[None] * len(place) if isinstance(place, list) else None for place in ctx.places]
        for place, gradient in zip(places, function.backward(own, *gradients)):
            if place is not None and gradient is not None:
                _at(found, place[:-1])[place[-1]] = gradient
        return tuple(found)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)


def _at(tree: Any, place: tuple[int, ...]) -> Any:
    for index in place:
        tree = tree[index]
    return tree


def same(*args: Any) -> tuple:
    """`inputs_of` in `differentiable` for a Function whose inputs are the op's arguments."""
    return args


def _lazily(name: str, load: Loader) -> Callable[..., Any]:
    """A stand-in for an implementation: its first call imports it, and puts it in place of the stand-in."""

    def first(*args: Any) -> Any:
        found = load()
        for table in (NATIVE, TRITON, CPU):
            if table.get(name) is first:
                table[name] = found
        return found(*args)

    return first


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context that disables autocast, so that matrix products keep their dtype. "meta" has no autocast."""
    # Dynamo up to torch 2.11 cannot trace is_autocast_available. Every device except meta has it, so skip the question.
    compiling = torch.compiler.is_compiling()
    available = device != "meta" if compiling else torch.amp.is_autocast_available(device)
    if available and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a closed form with autocast disabled, which would do its matrix products in 16 bits. The device is that of
    the first tensor among the arguments."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with no_autocast(next(arg.device.type for arg in args if isinstance(arg, Tensor))):
            return function(*args)

    return run
