"""Ops on DTensors: every process runs the op on its part, and the result is that of one process.

Each dimension of the device mesh is treated separately. If it shards an op's leading tensor along the batch, the other
tensors and the results are sharded alike. If it shards the event of an op that sums over it, each process has an addend
of the sum. If it shards the components of a mixture and not its rows, each process has a mixture of its own, and the op
combines their densities. Else the tensors are gathered and every process computes the whole. That is right for any op,
so `RULES` has only the ops that can do better. A seed's noise is that of the undivided tensor, of which each process
draws its part.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _sampling as sampling
from fastkl.ops._torch import is_sharded, uncompiled

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor

Function = TypeVar("Function", bound=Callable[..., Any])
SUM = "sum"  # instead of a result's dimension: each process has an addend of the result
DATUM = "datum"  # one value per datum, sharded as the batch is
COMPONENT = -1  # the last dimension of a result, sharded as the components are
# (index of each sharded argument -> its sharded dimension; that of each result, or SUM)
Places = tuple[dict[int, "int | None"], "list[int | str]"]
Region = list[slice]  # this process's part of each dimension of a tensor


class Rule(NamedTuple):
    """How an autograd.Function, or a public function, is sharded."""

    leads: tuple[int, ...] = ()  # indices of the arguments that may lead; the first sharded one does
    along: Callable[[tuple, Tensor, int], Places | None] = lambda args, lead, dim: None  # None: gather
    draw: Callable[..., Any] | None = None  # calls the function with this process's part of the noise instead of a seed
    means: int = -1  # index of a mixture's means: logits are before it, logvars and scale_tril after it
    by_component: tuple[Any, ...] = (None,)  # the results' places if components are sharded; None is a whole one


def _aligned(tensor: Tensor | None, like: Tensor, dim: int) -> int | None:
    """The dimension of a tensor that broadcasting pairs with `dim` of `like`, if the sizes agree; else None."""
    own = -1 if tensor is None else dim - like.dim() + tensor.dim()
    return own if own >= 0 and tensor is not None and tensor.shape[own] == like.shape[dim] else None


# `along` of the rules: the arguments, the leading tensor and its sharded dimension -> the places, or None to gather.
# `draw` of the rules: the arguments and this process's part of the leading tensor's shape -> the function's result.


def _normal(args: tuple, lead: Tensor, dim: int) -> Places | None:
    op, packed_dim, settings, _, parameter, *prior = args[:-2]
    batch_ndim = lead.dim() - settings.event_ndim
    value: int | str = dim if dim < batch_ndim else SUM
    if parameter is None and dim == packed_dim % lead.dim():
        return None
    if op.averages:  # over the batch, with a value per dimension of the event
        if dim < batch_ndim:
            return None
        value = dim - batch_ndim
    z = dim if not op.draws or settings.num_samples is None else dim + 1
    priors = {5 + place: _aligned(tensor, lead, dim) for place, tensor in enumerate(prior)}
    return {3: dim, 4: dim, **priors, 7: z}, [*[z] * op.draws, *[value] * op.has_value]


def _draw_normal(call: Callable[..., Any], args: list, shape: list[int], region: Region) -> Any:
    packed_dim, settings, _, parameter, *_, seed = args[1:]
    if seed is None:
        return call(*args)
    if parameter is None:  # a packed head, which is not sharded along its halves
        shape[packed_dim] //= 2
        region[packed_dim] = slice(0, shape[packed_dim])
    eps = _part_of_normals(seed, shape, region, settings.num_samples, settings.stream)
    return call(*args[:7], eps, None)


def _likelihood(args: tuple, lead: Tensor, dim: int) -> Places:
    value: int | str = dim if dim < lead.dim() - args[1] else SUM
    return {2: dim, 3: dim, 4: _aligned(args[4], lead, dim)}, [value]


def _choice(args: tuple, lead: Tensor, dim: int) -> Places | None:
    return None if dim == args[5] else ({0: dim}, [dim])


def _draw_choice(call: Callable[..., Any], args: list, shape: list[int], region: Region) -> Any:
    """The choice from drawn noise, as in the Function's rule for vmap."""
    logits, tau, seed, constant, hard, dim, stream = args
    gumbel = sampling.draw_gumbel(seed, torch.Size(shape), stream)[tuple(region)]
    perturbed = logits.to(reference.compute_dtype(logits)) + gumbel
    return reference.relaxed_one_hot(perturbed, constant if tau is None else tau, hard, dim).to(logits.dtype)


def _samples(args: tuple, lead: Tensor, dim: int) -> Places | None:
    own = args[1] % lead.dim() if -lead.dim() <= args[1] < lead.dim() else dim
    return None if dim == own else ({0: dim}, [dim - (dim > own)])


def _batch(*events: int, results: tuple[str, ...] = (DATUM,), eps: int = -1) -> Callable[..., Places | None]:
    """Tensors whose batches broadcast. `events` has the number of dimensions of each after its batch; 1 for a lead."""

    def along(args: tuple, lead: Tensor, dim: int) -> Places | None:
        counts = events or [1 + (args[index].dim() > args[index & 2].dim()) for index in range(4)]
        batches = [
            t.shape[: max(0, t.dim() - event)] if isinstance(t, Tensor) else () for t, event in zip(args, counts)
        ]
        batch = torch.broadcast_shapes(*batches)
        if dim >= len(batch) or lead.shape[:-1] != batch:
            return None
        of_each = [dim - len(batch) + len(own) for own in batches]
        places = [place if place >= 0 and own[place] == batch[dim] else None for own, place in zip(batches, of_each)]
        return {eps: dim + 1, **dict(enumerate(places))}, [dim if each == DATUM else each for each in results]

    return along


def _draw_kl_gmm(call: Callable[..., Any], args: list, shape: list[int], region: Region) -> Any:
    num_samples, seed, eps = args[9], args[12], args[13]
    if eps is None and args[8] == "mc":
        eps = _part_of_normals(seed, shape, region, num_samples, reference.Stream.POSTERIOR)
    return call(*args[:12], None, eps, *args[14:])


def _components(args: tuple, means: int, dim: int) -> dict[int, int | None] | None:
    """The dimension of the components in each tensor of the mixture, None in one that all components share. The result
    is None if `dim` of the means is another dimension."""
    count = args[means].shape[dim]
    places = {means - 1: -1, means: -2, means + 1: -2, means + 2: -3}
    found: dict[int, int | None] = {}
    for index, place in places.items():
        tensor = args[index]
        own = isinstance(tensor, Tensor) and tensor.dim() >= -place and tensor.shape[place] == count
        found[index] = tensor.dim() + place if own else None
    return found if found[means] == dim and found[means - 1] is not None else None


# Name -> rule; the indices count the arguments.
RULES = {
    "NormalFunction": Rule((3, 4), _normal, _draw_normal),
    "LikelihoodFunction": Rule((2, 3), _likelihood),
    "_GumbelSoftmax": Rule((0,), _choice, _draw_choice),
    "_ToLogvar": Rule((0,), lambda args, lead, dim: ({0: dim}, [dim])),
    "_Collapse": Rule((0,), lambda args, lead, dim: None if dim in args[1] else ({0: dim}, [dim])),
    "gmm_log_prob": Rule((0,), _batch(1, 1, 2, 2, 3), means=2),
    "gmm_responsibilities": Rule((0,), _batch(1, 1, 2, 2, 3), means=2, by_component=(COMPONENT,)),
    "gmm_moments": Rule((0,), _batch(1, 1, 2, 2, 3, results=(DATUM, SUM, SUM, SUM))),
    "kl_gmm": Rule((0, 1), _batch(1, 1, 1, 2, 2, 3, eps=13), _draw_kl_gmm, means=3),
    "kl_gmm_bounds": Rule((0, 1), _batch(1, 1, 1, 2, 2, 3, results=(DATUM, DATUM)), means=3, by_component=(None, None)),
    "_triangles": Rule((0,), lambda args, lead, dim: None if dim else ({0: 0, 1: 0}, [0])),
    # Each scale is a vector like its mean, or a matrix.
    "kl_multivariate_normal": Rule((0,), _batch()),
    "wasserstein2_multivariate_normal": Rule((0,), _batch()),
    "iwae": Rule((0,), _samples),
    "effective_sample_size": Rule((0,), _samples),
    "weight_entropy": Rule((0,), _samples),
}


@uncompiled
def apply(call: Callable[..., Any], function: Any, args: tuple) -> Any:
    """call(*args) of a function, with DTensors among the arguments and in the result."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    rule = RULES.get(function.__name__, Rule())
    mesh = next(arg.device_mesh for arg in args if isinstance(arg, DTensor))
    # For each dimension of the mesh: the places (None: gather), and the sharded dimension of the lead. Its shape.
    found: list[Places | None] = [None] * mesh.ndim
    along, shape = [-1] * mesh.ndim, []
    for number, lead in itertools.product(range(mesh.ndim), rule.leads):
        placement = args[lead].placements[number] if isinstance(args[lead], DTensor) else None
        if found[number] is None and type(placement) is Shard:
            found[number], along[number] = rule.along(args, args[lead], placement.dim), placement.dim
            shape = list(args[lead].shape)
    rows = list(found)  # of these places alone, without those of components
    means: Any = args[rule.means] if rule.means >= 0 else None
    for number, placement in enumerate(means.placements if isinstance(means, DTensor) else ()):
        if found[number] is None and type(placement) is Shard:
            components = _components(args, rule.means, placement.dim)
            found[number] = None if components is None else (components, list(rule.by_component))
    # Only a function of a mixture has these groups, as its last argument.
    split = [number for number in range(mesh.ndim) if found[number] is not rows[number]]
    if split:
        args = (*args[:-1], tuple(mesh.get_group(number) for number in split))

    def placements(dims: Sequence[Any], shared: Any) -> list[Any]:
        """Those of a tensor with these sharded dimensions; `shared` where only other tensors are sharded."""
        parts = [Partial() if dim == SUM else shared if dim is None else Shard(dim) for dim in dims]
        return [Replicate() if places is None else part for places, part in zip(found, parts)]

    def local(index: int, arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        arg = arg if isinstance(arg, DTensor) else _as_whole(function, index, arg, mesh)
        dims = [None if places is None else places[0].get(index) for places in found]
        # Each process has an addend of the gradient of a tensor that it shares with others.
        gradients = placements(dims, Partial())
        return arg.redistribute(mesh, placements(dims, Replicate())).to_local(grad_placements=gradients)

    own = [local(index, arg) for index, arg in enumerate(args)]
    if rule.draw is None or not any(rows):
        results = call(*own)
    else:
        results = rule.draw(call, own, shape, _region(shape, mesh, rows, along))

    def whole(index: int, result: Tensor) -> DTensor:
        dims = [None if places is None else places[1][index] for places in found]
        sizes = list(result.shape)
        for number, dim in enumerate(dims):
            if isinstance(dim, int):
                sizes[dim] = means.shape[-2] if number in split else shape[along[number]]
        dims = [result.dim() - 1 if dim == COMPONENT else dim for dim in dims]
        size, stride = torch.Size(sizes), _strides(sizes, result)
        return DTensor.from_local(result, mesh, placements(dims, Replicate()), shape=size, stride=stride)

    if isinstance(results, Tensor):
        return whole(0, results)
    parts = [whole(index, result) for index, result in enumerate(results)]
    return tuple(parts) if type(results) in (list, tuple) else type(results)(*parts)  # a named tuple


def by_parts(function: Function) -> Function:
    """Let a public function hand DTensors to `apply` as its caller gave them, before it converts arguments."""
    signature = inspect.signature(function)
    parameters = signature.parameters
    defaults = {name: each.default for name, each in parameters.items()}
    positional = sum(each.kind is not each.KEYWORD_ONLY for each in parameters.values())

    def call(*values: Any) -> Any:
        given = dict(zip(parameters, values))
        if isinstance(given.get("seed"), Tensor):
            given["seed"] = given["seed"], 0  # as it is: the seed of the mesh's first process
        values = tuple(given.values())
        return function(*values[:positional], **dict(zip(list(parameters)[positional:], values[positional:])))

    @functools.wraps(function)
    def run(*args: Any, **settings: Any) -> Any:
        if not is_sharded((*args, *settings.values())):
            return function(*args, **settings)
        given = {**defaults, **dict(zip(parameters, args)), **settings}
        if "seed" in given and given.get("eps") is None:
            first = next(value for value in given.values() if isinstance(value, Tensor))
            given["seed"] = sampling.check_seed(given["seed"], first.device, "a tensor")
        return apply(call, function, tuple(given.values()))

    public = [each for name, each in parameters.items() if not name.startswith("_")]
    run.__signature__ = signature.replace(parameters=public)  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def _as_whole(function: Any, index: int, tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A plain tensor beside DTensors, as a DTensor: a seed, set by the mesh's first process, or a converted number."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not tensor.is_floating_point():
        own = tensor if not any(mesh.get_coordinate() or ()) else torch.zeros_like(tensor)
        return DTensor.from_local(own, mesh, [Partial()] * mesh.ndim)
    if any(stride and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        name = list(inspect.signature(getattr(function, "forward", function)).parameters)[index]
        raise TypeError(
            f"{'logvar' if name == 'parameter' else name} is a plain tensor beside DTensors: make it one, by "
            "DTensor.from_local or distribute_tensor; parameters that fully_shard keeps sharded are whole inside the "
            "forward method, and in those that register_fsdp_forward_method names"
        )
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)


def _region(shape: list[int], mesh: DeviceMesh, found: list[Places | None], along: list[int]) -> Region:
    """This process's part of a tensor of this shape: each shard is cut as by torch.chunk."""
    region = [slice(0, size) for size in shape]
    for number, (places, dim) in enumerate(zip(found, along)):
        if places is not None:
            first, last = region[dim].start, region[dim].stop
            step, rank = -(-(last - first) // mesh.size(number)), mesh.get_local_rank(number)
            region[dim] = slice(min(last, first + rank * step), min(last, first + (rank + 1) * step))
    return region


def _part_of_normals(
    seed: Tensor, shape: list[int], region: Region, num_samples: int | None, stream: int
) -> Tensor:  # fmt: skip
    """The region of reference.normal_noise(seed, shape, num_samples)."""
    rows, *others = region
    row, samples = math.prod(shape[1:]), range(1 if num_samples is None else num_samples)
    eps = sampling.normals(seed, samples, rows.start * row, rows.stop * row, stream)
    index = slice(None), slice(None), *others
    eps = eps.reshape(len(samples), rows.stop - rows.start, *shape[1:])[index]
    return eps[0] if num_samples is None else eps


def _strides(sizes: list[int], part: Tensor) -> tuple[int, ...]:
    """Strides of the whole tensor, in the order of those of a part of it."""
    strides, step = [0] * len(sizes), 1
    for dim in sorted(range(len(sizes)), key=lambda dim: (part.stride(dim), -dim)):
        strides[dim], step = step, step * max(1, sizes[dim])
    return tuple(strides)
