"""Every private name of torch that fastkl uses, each with a correct fallback.

A release of torch may rename any of them. Then fastkl still works, but slower: calls go through torch's dispatcher and
gradients use their differentiable formula. The logger "fastkl" warns once per missing name.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("fastkl")


def _say(name: str) -> None:
    _log.warning("torch %s has no %s, which fastkl does without: results are right and slower", torch.__version__, name)


def _private(name: str) -> Any:
    """torch.<name>, or None."""
    try:
        return functools.reduce(getattr, name.split("."), torch)
    except AttributeError:
        _say(f"torch.{name}")
        return None


def _always(*args: Any) -> bool:
    return True


# Whether something intercepts a call: a dispatch mode, a transform of torch.func, a profiler, a tracer.
modes_active = _private("_C._len_torch_dispatch_stack") or _always
transforms_active: Callable[[], bool] = _private("_C._are_functorch_transforms_active") or _always
profiling = _private("autograd._profiler_enabled") or _always
tracing = _private("_C._get_tracing_state") or _always

# The innermost level of tangents: -1 if there is none, 0 if torch does not tell.
_forward_ad = torch.autograd.forward_ad
_has_level = _private("autograd.forward_ad._current_level") is not None
forward_level: Callable[[], int] = functools.partial(getattr, _forward_ad, "_current_level", 0)


def forward_mode() -> bool:
    """Whether tensors may carry tangents: within torch.autograd.forward_ad.dual_level or torch.func.jvp."""
    if not _has_level:
        return not torch.compiler.is_compiling()  # compiled graphs never have tangents
    return _forward_ad._current_level >= 0


_set_forward_mode = _private("autograd.forward_ad._set_fwd_grad_enabled")


def outer_tangents() -> Any:
    """A context for use inside a Function's jvp: torch operations in it have forward-mode derivatives."""
    if _set_forward_mode is None:
        raise NotImplementedError(f"fastkl has no forward-mode derivatives with torch {torch.__version__}")
    return _set_forward_mode(True)


kl_registry = _private("distributions.kl._KL_REGISTRY")  # (class, class) -> function of register_kl
_kl_memory = _private("distributions.kl._KL_MEMOIZE")


def forget_kl(classes: tuple[type, type]) -> None:
    """Remove the KL divergence registered for these two classes."""
    del kl_registry[classes]
    if _kl_memory is not None:
        _kl_memory.clear()


_dispatch_kl = _private("distributions.kl._dispatch_kl")


@contextlib.contextmanager
def kl_looked_up() -> Iterator[None]:
    """What is registered within the block is found at once by the pairs of classes whose divergence was looked up
    before: registering forgets them, and torch.compile cannot trace the look-up."""
    pairs = list(_kl_memory or ())
    try:
        yield
    finally:
        if _dispatch_kl is not None and _kl_memory is not None:
            with warnings.catch_warnings():  # of ambiguous ones it has warned the first time
                warnings.simplefilter("ignore")
                _kl_memory.update((pair, _dispatch_kl(*pair)) for pair in pairs)


def forget_compiled() -> None:
    """Let functions of torch.compile be compiled anew: a replaced method of a class is no reason for it by itself."""
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled
        torch.compiler.reset()


def validate_sample(distribution: torch.distributions.Distribution, value: Tensor) -> None:
    """Raise ValueError if the distribution validates arguments and the value is outside its support."""
    try:
        if distribution._validate_args:
            distribution._validate_sample(value)
    except AttributeError:
        _say("distributions.Distribution._validate_sample")


is_zero = _private("Tensor._is_zerotensor") or _always  # zeros that were never written to memory

# A decorator: the compiler calls the function as it is, and goes on behind it. torch.compiler.disable would import the
# compiler at once.
uncompiled: Callable[[Any], Any] = _private("_disable_dynamo") or (lambda function: function)


def is_sharded(args: Iterable[Any]) -> bool:
    """Whether one of them is a DTensor. Its module takes as long to import as all of torch, and if nobody did so there
    is none."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and getattr(module, "DTensor", None) in [type(arg) for arg in args]


_is_batched = _private("_C._functorch.is_batchedtensor") or _always
_is_legacy_batched = _private("_C._functorch.is_legacy_batchedtensor") or _always


def may_be_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of them may be batched, by torch.func.vmap or by is_grads_batched."""
    for tensor in tensors:  # noqa: SIM110 (a generator would cost more than the questions)
        if tensor is not None and (_is_batched(tensor) or _is_legacy_batched(tensor)):
            return True
    return False


_binds_only = hasattr(super(torch.autograd.Function, torch.autograd.Function), "apply")
if not _binds_only:
    _say("apply above torch.autograd.Function's")


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without binding its signature, for use when no transform is active."""
    return super(torch.autograd.Function, function).apply if _binds_only else function.apply  # type: ignore[misc]


_softmax_gradient = _private("_softmax_backward_data")


def softmax_gradient(dy: Tensor, y: Tensor, dim: int) -> Tensor:
    """The gradient in x of y = softmax(x, dim)."""
    if _softmax_gradient is None:
        dx = dy * y
        return dx - y * dx.sum(dim, keepdim=True)
    return _softmax_gradient(dy, y, dim, y.dtype)


_register_container = _private("utils._pytree.register_pytree_node")
_key = _private("utils._pytree.SequenceKey")


def register_container(cls: type, flatten: Callable[[Any], tuple], unflatten: Callable[[Any, Any], Any]) -> None:
    """Let torch find the tensors inside a class of ours: fully_shard and DistributedDataParallel in a model's outputs,
    torch.func in what it maps over, torch.export in inputs and outputs.

    flatten(object) is (its tensors, a tuple of plain values), unflatten(tensors, values) the object.
    """
    if _register_container is None or _key is None:
        return

    def with_keys(container: Any) -> tuple:
        tensors, values = flatten(container)
        return [(_key(index), tensor) for index, tensor in enumerate(tensors)], values

    exported = {"to_dumpable_context": list, "from_dumpable_context": tuple, "flatten_with_keys_fn": with_keys}
    _register_container(cls, flatten, unflatten, serialized_type_name=f"fastkl.{cls.__name__}", **exported)


def known_equal(first: int, second: int) -> bool:
    """Whether two sizes are equal; while tracing, whether they are known to be equal in every call. A plain comparison
    would add a guard and specialise the graph."""
    if not torch.compiler.is_compiling():
        return first == second
    from torch.fx.experimental import symbolic_shapes  # slow to import, but already imported while tracing

    return symbolic_shapes.statically_known_true(first == second)
