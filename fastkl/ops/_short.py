"""Fast path for the common CPU call: mu and logvar of one shape and dtype, no prior, no bounds, no active dispatch mode
or transform.

For small latents the time goes into Python, mostly into checks of the arguments. Their outcome is cached per shape: a
`Way` goes from the tensors to the native loop in a few steps, forward and backward. The loop is the same one, so the
results are bit-identical.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl.ops._register import CPU, NATIVE, apply_directly, needs_closed_form
from fastkl.ops._torch import dispatcher_is_idle, memory_device

_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_FREE = (float("-inf"), float("inf"), False)
MOST_WAYS = 1024


class Way:
    """The cached plans for one op, shape, layout and dtype.

    op is "kl_normal", "wasserstein2_normal", "rsample_kl" or "rsample_normal". `general` is the op's ordinary backward
    pass; it takes the gradients of the outputs, mu, logvar, (the seed,) and the settings, as the op's Function does.
    """

    def __init__(self, op: str, general: Callable[..., Any], event_ndim: int, scale: str, mu: Tensor, logvar: Tensor):
        self.op, self.general, self.layout = op, general, _layout(mu, logvar)
        self.settings = (None, -1, event_ndim, scale, *_FREE)
        self.forward: Any = None
        self.backward: dict[tuple, Any] = {}

    def plan(self, name: str, mu: Tensor, logvar: Tensor, others: tuple[Tensor | None, ...]) -> Any:
        normal = importlib.import_module("fastkl.native.normal")
        distance = normal.WASSERSTEIN2 if self.op == "wasserstein2_normal" else normal.KL
        samples = 1 if self.op.startswith("rsample") else 0
        return normal.make(name, (distance, False, *self.settings), [mu, logvar], samples, others)


def _layout(mu: Tensor, logvar: Tensor) -> tuple:
    return mu.shape, mu.stride(), logvar.shape, logvar.stride(), mu.dtype, logvar.dtype


_WAYS: dict[tuple, Way | None] = {}


def find(
    op: str, mu: Tensor, logvar: Tensor, event_ndim: int, scale: str, general: Callable[..., Any],
    seed: Tensor | None = None,
) -> Way | None:  # fmt: skip
    """The fast path for this call, or None if there is none. The tensors must have passed arguments.is_common_call."""
    if op.startswith("rsample") and mu.dtype is torch.float64:
        return None  # float64 noise is drawn by the closed form
    if not mu.is_cpu or type(mu) not in _TENSORS or type(logvar) not in _TENSORS or not dispatcher_is_idle():
        return None
    if seed is not None and not _in_memory(seed):
        return None
    key = (op, mu.shape, mu.stride(), logvar.stride(), mu.dtype, event_ndim, scale)
    try:
        way = _WAYS[key]
    except KeyError:
        if len(_WAYS) >= MOST_WAYS:
            _WAYS.clear()
        way = Way(op, general, event_ndim, scale, mu, logvar)
        z = torch.empty_like(mu) if op.startswith("rsample") else None
        way.forward = way.plan("forward", mu, logvar, (None, None, None, z, None)) if mu.numel() else None
        way = _WAYS[key] = None if way.forward is None else way
    return way if CPU[f"{op}_fwd"] is NATIVE[f"{op}_fwd"] else None


def value(way: Way, mu: Tensor, logvar: Tensor) -> Tensor:
    return apply_directly(_Value, mu, logvar, way)


def sample_and_value(way: Way, mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return apply_directly(_SampleAndValue, mu, logvar, seed, way)


def sample(way: Way, mu: Tensor, logvar: Tensor, seed: Tensor) -> Tensor:
    return apply_directly(_Sample, mu, logvar, seed, way)


def _gradients(way: Way, mu: Tensor, logvar: Tensor, seed: Tensor | None, dvalue: Tensor | None, dz: Tensor | None):
    key = tuple(None if d is None else (d.stride(), d.dtype) for d in (dvalue, dz))
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(logvar)
    plan = way.backward.get(key)
    if plan is None:
        others = (None, None, None, dvalue, dz, dmu, dlogvar, None, None)
        plan = way.backward[key] = way.plan("backward", mu, logvar, others)
    incoming = (0 if dvalue is None else dvalue.data_ptr(), 0 if dz is None else dz.data_ptr())
    outgoing = (dmu.data_ptr(), dlogvar.data_ptr())
    noise = 0 if seed is None else seed.data_ptr()
    plan.run(noise, mu.data_ptr(), logvar.data_ptr(), 0, 0, 0, *incoming, *outgoing, 0, 0)
    return dmu, dlogvar


def _in_memory(tensor: Tensor | None) -> bool:
    """Whether this is a plain CPU tensor whose values a native loop can read from memory."""
    return type(tensor) in _TENSORS and memory_device(tensor) == "cpu"


def _is_usable(way: Way, mu: Tensor, logvar: Tensor, seed: Tensor | None, *gradients: Tensor | None) -> bool:
    """Whether backward can use the fast path too. Hooks on saved tensors may have changed their layout."""
    if not dispatcher_is_idle() or _layout(mu, logvar) != way.layout:
        return False
    if not (_in_memory(mu) and _in_memory(logvar) and (seed is None or _in_memory(seed))):
        return False
    for gradient in gradients:
        if not _in_memory(gradient) or needs_closed_form(gradient):
            return False
        if gradient.dtype is not mu.dtype and gradient.dtype is not way.forward.dtype:
            return False
    return True


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(mu, logvar, way):
        plan = way.forward
        out = mu.new_empty(plan.result, dtype=plan.dtype)
        plan.run(0, mu.data_ptr(), logvar.data_ptr(), 0, 0, 0, 0, out.data_ptr())
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.way = inputs[2]

    @staticmethod
    def backward(ctx, dvalue):
        mu, logvar = ctx.saved_tensors
        if not _is_usable(ctx.way, mu, logvar, None, dvalue):
            return (*ctx.way.general(dvalue, mu, logvar, ctx.way.settings[1:]), None)
        return (*_gradients(ctx.way, mu, logvar, None, dvalue, None), None)


class _SampleAndValue(torch.autograd.Function):
    @staticmethod
    def forward(mu, logvar, seed, way):
        plan = way.forward
        z, out = torch.empty_like(mu), mu.new_empty(plan.result, dtype=plan.dtype)
        plan.run(seed.data_ptr(), mu.data_ptr(), logvar.data_ptr(), 0, 0, 0, z.data_ptr(), out.data_ptr())
        return z, out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1], inputs[2])
        ctx.way = inputs[3]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dz, dvalue):
        mu, logvar, seed = ctx.saved_tensors
        if not _is_usable(ctx.way, mu, logvar, seed, dvalue, dz):
            return (*ctx.way.general(dz, dvalue, mu, logvar, seed, ctx.way.settings), None, None)
        return (*_gradients(ctx.way, mu, logvar, seed, dvalue, dz), None, None)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(mu, logvar, seed, way):
        z = torch.empty_like(mu)
        way.forward.run(seed.data_ptr(), mu.data_ptr(), logvar.data_ptr(), 0, 0, 0, z.data_ptr(), 0)
        return z

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], inputs[1], inputs[2])
        ctx.way = inputs[3]

    @staticmethod
    def backward(ctx, dz):
        mu, logvar, seed = ctx.saved_tensors
        if not _is_usable(ctx.way, mu, logvar, seed, dz):
            return (*ctx.way.general(dz, mu, logvar, seed, ctx.way.settings), None, None)
        return (*_gradients(ctx.way, mu, logvar, seed, None, dz), None, None)
