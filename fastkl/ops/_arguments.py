"""Argument checks and broadcasting for every op, before any launch. Each error names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.ops._torch import is_sharded
from fastkl.reference import SCALES, SoftBounds

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NO_BOUNDS = (float("-inf"), float("inf"), False)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise if a tensor is sparse or nested."""
    # Nested tensors of the older kind report a strided layout. The compiler does not support them at all.
    nested = not torch.compiler.is_compiling() and tensor.is_nested
    if nested or tensor.layout is not torch.strided:
        found = "a nested one, whose parts have different shapes" if nested else f"one of layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {found}")


# Arguments that are optional in every op.
OPTIONAL = frozenset({"prior_mu", "prior_logvar", "eps", "logvars", "scale_tril", "weights_x", "weights_y"})


def check_tensors(**tensors: Tensor | None) -> None:
    """Require dense floating-point tensors, or None for optional ones, all on one device."""
    first_name, first_device = "", None
    for name, tensor in tensors.items():
        if tensor is None and name in OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.dtype not in DTYPES:
            known = "float16, bfloat16, float32 and float64 are known"
            raise TypeError(f"{name} must be a floating-point tensor, got dtype {tensor.dtype}; {known}")
        if first_device is None:
            first_name, first_device = name, tensor.device
        elif tensor.device != first_device:
            raise ValueError(f"{name} is on {tensor.device}, but {first_name} is on {first_device}; move one of them")


def as_tensors(like: Any, *values: Any) -> tuple[Any, ...]:
    """Numbers become tensors without dimensions, on `like`'s device in its compute dtype; all else is unchanged."""
    for value in values:
        if value is not None and not isinstance(value, Tensor):
            break
    else:
        return values
    if not isinstance(like, Tensor) or like.dtype not in DTYPES:
        return values
    numbers: Any = (Real, torch.SymFloat, torch.SymInt)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tuple(
        torch.full((), value, dtype=dtype, device=like.device)
        if isinstance(value, numbers) and not isinstance(value, bool)
        else value
        for value in values
    )


def as_parameters(mu: Tensor | float | None, parameter: Tensor | float | None, *others: Any) -> tuple[Any, ...]:
    """as_tensors for a Gaussian's parameters, at least one of them a tensor, and its prior's."""
    return as_tensors(mu if isinstance(mu, Tensor) else parameter, mu, parameter, *others)


def number_in(tensor: Tensor) -> float | None:
    """The value of a tensor without dimensions. None if reading it would synchronise with a device or is impossible:
    while tracing, on "meta", or if it differs between the examples of torch.func.vmap."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return tensor.item()
    except RuntimeError:
        return None


def check_samples(*, part: bool = False, **samples: Tensor) -> None:
    """Require points [N, D], with the same D > 0, and N > 0 unless they are the part of one process."""
    check_tensors(**samples)
    for name, points in samples.items():
        if points.dim() != 2:
            raise ValueError(f"{name} must be points [N, D], got {tuple(points.shape)}")
        if 0 in points.shape[part:]:
            raise ValueError(f"{name} must have at least one point and one dimension, got {tuple(points.shape)}")
    (first, x), (second, y) = samples.items()
    if x.shape[1] != y.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"{first} and {second} must have as many dimensions, got {shapes}")


def check_int(name: str, value: Any, minimum: int) -> Any:
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_dim(dim: Any, name: str, tensor: Tensor) -> int:
    """A dimension of the tensor called `name`, as a non-negative number."""
    dim = check_int("dim", dim, -(2**63))
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim={dim} is out of range for {name}, which has {tensor.dim()} dimensions")
    return dim % tensor.dim()


def check_number(name: str, value: Any, *, above: bool = False) -> float:
    """Require a finite number, >= 0 or (`above`) > 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not 0 <= number < float("inf") or (above and number == 0):
        raise ValueError(f"{name} must be a finite number{' above 0' if above else ', 0 or more'}, got {value}")
    return number


def check_weight(name: str, value: Any) -> Tensor | float:
    """Require a number >= 0, or a tensor with one value, which is not checked."""
    if not isinstance(value, Tensor):
        return check_number(name, value)
    check_dense(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one value, got {tuple(value.shape)}")
    return value.reshape(())


def check_event_ndim(event_ndim: int, shape: torch.Size, what: str = "the broadcast shape") -> int:
    event_ndim = check_int("event_ndim", event_ndim, 0)
    if event_ndim > len(shape):
        has = f"{what} {tuple(shape)} has {len(shape)}"
        raise ValueError(f"event_ndim={event_ndim} needs at least {event_ndim} dimensions, but {has}")
    return event_ndim


def check_choice(name: str, value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def check_scale(scale: str) -> str:
    return check_choice("scale", scale, SCALES)


def check_bounds(bounds: SoftBounds | tuple[float, float] | None) -> tuple[float, float, bool]:
    """(low, high, live): the clamp of the log-variance, and whether the gradient passes outside it."""
    if bounds is None:
        return NO_BOUNDS
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise TypeError(f"bounds must be a pair (low, high) of numbers, or fastkl.SoftBounds, got {bounds!r}") from None
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got ({low}, {high})")
    return low, high, isinstance(bounds, SoftBounds)


def broadcast_shape(**tensors: Tensor | None) -> torch.Size:
    return common_shape({name: tensor.shape for name, tensor in tensors.items() if tensor is not None})


def common_shape(shapes: dict[str, torch.Size]) -> torch.Size:
    """The shape to which these broadcast, by the name of their tensors."""
    first, *others = shapes.values()
    for shape in others:
        if len(shape) != len(first) or shape != first:  # rank first: else a trace compares batch with event
            break
    else:
        return first
    if not torch.compiler.is_compiling():  # torch.broadcast_shapes takes as long as all other checks of a small KL
        for full in shapes.values():
            if all(expands(shape, full) for shape in shapes.values()):
                return full
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"these shapes do not broadcast: {listed}") from None


def expand_prior(
    prior_mu: Tensor | None, prior_logvar: Tensor | None, like: Tensor, shape: torch.Size, event_ndim: int
) -> tuple[Tensor | None, Tensor | None]:
    """Both prior parameters expanded to the event's shape if the whole batch shares them, else to the full shape.

    A shared prior keeps its small shape so that the backward kernel can sum its gradient over the batch instead of
    writing one gradient per row. If one of the two is missing, it is 0.
    """
    if prior_mu is None and prior_logvar is None:
        return None, None
    prior_mu = like.new_zeros(()) if prior_mu is None else prior_mu
    prior_logvar = like.new_zeros(()) if prior_logvar is None else prior_logvar
    batch_ndim = len(shape) - event_ndim
    event = shape[batch_ndim:]
    if is_shared(prior_mu, event_ndim) and is_shared(prior_logvar, event_ndim):
        return expand(_drop_batch(prior_mu, event_ndim), event), expand(_drop_batch(prior_logvar, event_ndim), event)
    return expand(prior_mu, shape), expand(prior_logvar, shape)


def is_shared(prior: Tensor, event_ndim: int) -> bool:
    """Whether every dimension before the event's is missing or of size 1."""
    return all(size == 1 for size in prior.shape[: max(0, prior.dim() - event_ndim)])


def _drop_batch(prior: Tensor, event_ndim: int) -> Tensor:
    return without_leading(prior, max(0, prior.dim() - event_ndim))


def without_leading(tensor: Tensor, count: int) -> Tensor:
    """`tensor` without its first `count` dimensions, which have size 1. DTensor reshapes none that is sharded."""
    if not count:
        return tensor
    return tensor.sum(tuple(range(count))) if is_sharded((tensor,)) else tensor.reshape(tensor.shape[count:])


def check_packed(head: Tensor, dim: int) -> int:
    """`dim` as a non-negative number: the dimension with mu in its first half and the scale in its second."""
    own = check_dim(dim, "head", head)
    if head.shape[own] % 2:
        raise ValueError(f"head packs mu and logvar along dim={dim}, whose size must be even, got {head.shape[own]}")
    return own


def batch_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the vmapped dimension to the front, or add it by expand(), for an op that takes any leading dimensions."""
    return expand(tensor, (size, *tensor.shape)) if dim is None else tensor.movedim(dim, 0)


def examples(size: int, dims, inputs) -> Iterator[tuple]:
    """The inputs of each example under vmap, for an op that needs one call per example."""
    for index in range(size):
        yield tuple(x if dim is None else x.select(dim, index) for x, dim in zip(inputs, dims))


def stacked(results: Sequence[tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What a Function's vmap returns, from the outputs of the calls for `examples`."""
    return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])


def match(gradient: Tensor, like: Tensor) -> Tensor:
    """`gradient` in the dtype and memory layout that the fake declares: those of torch.empty_like(like)."""
    out = torch.empty_like(like)
    if gradient.dtype == out.dtype and gradient.shape == out.shape and gradient.stride() == out.stride():
        return gradient
    return out.copy_(gradient)


def as_bounds(low: float, high: float, live: bool) -> SoftBounds | tuple[float, float] | None:
    """The user's `bounds`, rebuilt from the numbers that the op's schema carries."""
    if (low, high) == NO_BOUNDS[:2]:
        return None
    return SoftBounds(low, high) if live else (low, high)


def batch_first_prior(prior, dims, shape: torch.Size, event_ndim: int) -> list[Tensor | None]:
    """The prior's two tensors under vmap: still shared by the batch, or of the full shape with the new dimension."""
    if all(tensor is None or (dim is None and tensor.dim() == event_ndim) for tensor, dim in zip(prior, dims)):
        return list(prior)
    full: list[Tensor | None] = []
    for tensor, dim in zip(prior, dims):
        tensor = batch_first(tensor, dim, shape[0])
        missing = len(shape) - tensor.dim()
        full.append(expand(tensor.reshape(shape[0], *[1] * missing, *tensor.shape[1:]), shape))
    return full


def check_prior_fits(shape: torch.Size, **prior: Tensor | None) -> None:
    """Raise if the prior is larger than the posterior: a packed head cannot be broadcast."""
    for name, tensor in prior.items():
        if tensor is None:
            continue
        if not fits(tensor, shape):
            raise ValueError(f"{name} {tuple(tensor.shape)} does not broadcast to the posterior's shape {tuple(shape)}")


def event_ndim_of_datum(event_ndim: int | None, shape: torch.Size, what: str = "the broadcast shape") -> int:
    """event_ndim, checked. None means every dimension after the first, the batch; a single dimension is one datum."""
    return check_event_ndim(max(1, len(shape) - 1) if event_ndim is None else event_ndim, shape, what)


def as_events(event_ndim: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """(event_ndim, *tensors) for an op. Ops sum at least one dimension, so for event_ndim = 0 one of size 1 is made."""
    if event_ndim:
        return (event_ndim, *tensors)
    return (1, *(None if tensor is None else tensor.unsqueeze(-1) for tensor in tensors))


# Elements in a block of rows: its temporaries fit the CPU cache.
BLOCK = 32768
EVERYTHING = slice(None)


def row_blocks(tensor: Tensor) -> list[slice]:
    """Slices of the first dimension for work by blocks on a CPU; [EVERYTHING] for work in one piece."""
    count = tensor.shape[0] if tensor.dim() else 1
    if torch.compiler.is_compiling():  # one graph for any number of rows
        return [EVERYTHING]
    if tensor.device.type != "cpu" or tensor.numel() <= 2 * BLOCK or count == 1:
        return [EVERYTHING]
    step = max(1, BLOCK * count // tensor.numel())
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def fits(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether the tensor broadcasts to exactly this shape."""
    return expands(tensor.shape, shape)


def expands(own: torch.Size, shape: torch.Size) -> bool:
    """Whether the shape `own` broadcasts to exactly `shape`."""
    if len(own) > len(shape):
        return False
    for size, full in zip(reversed(own), reversed(shape)):  # noqa: SIM110 (a generator takes twice as long)
        if size != 1 and size != full:
            return False
    return True


def expand(tensor: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """tensor.expand(shape) with its gradient summed in float32: in 16 bits each addend could underflow to 0. Always
    broadcast with this before an op."""
    if tensor.dim() == len(shape) and tensor.shape == shape:
        return tensor
    return (tensor.float() if tensor.itemsize == 2 else tensor).expand(shape)


def rows_of(tensor: Any, rows: slice, like: Tensor) -> Any:
    """The rows of a tensor with like's dimensions, or with samples before them; all of a tensor that rows share."""
    if tensor is None or rows is EVERYTHING or tensor.dim() < like.dim():
        return tensor
    if tensor.dim() > like.dim():
        return tensor[:, rows]
    return tensor if tensor.shape[0] == 1 else tensor[rows]


def by_rows(function, like: Tensor, event_ndim: int, tensors: Sequence[Tensor | None]) -> Tensor:
    """function(*tensors), which gives one value per row of `like`, evaluated in blocks of rows."""
    blocks = row_blocks(like)
    if len(blocks) == 1 or like.dim() == event_ndim:  # one datum: there is no value per row
        return function(*tensors)
    return torch.cat([function(*(rows_of(tensor, rows, like) for tensor in tensors)) for rows in blocks])
