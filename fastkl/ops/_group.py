"""A batch that is spread over the processes of a torch.distributed group: gathered, or passed around block by block.

Gradients: the result of every process counts once, so a row's gradient is the sum over all processes' results.
DistributedDataParallel averages the parameters' gradients over the processes, and so gets the gradient of the mean of
the results, or of the result itself if it is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkl.ops._torch import forward_mode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(group: ProcessGroup | None, *tensors: Tensor) -> tuple[list[Tensor], int]:
    """(the tensors of all processes concatenated along dimension 0 by rank, the index of this process's first row).

    Processes may have different numbers of rows, but all tensors of a process the same. Without a group, or in a group
    of one, the tensors are returned as they are.
    """
    if group is None:
        return list(tensors), 0
    sizes = row_counts(group, tensors[0].shape[0], tensors[0].device)
    if len(sizes) == 1:
        return list(tensors), 0
    rank = torch.distributed.get_rank(group)
    refuse_forward_mode()
    return [gathered(group, tensor, sizes) for tensor in tensors], sum(sizes[:rank])


def gathered(group: ProcessGroup, tensor: Tensor, sizes: list[int]) -> Tensor:
    """`gather` of one tensor, if the numbers of rows are known."""
    return _Gather.apply(tensor, sizes, group)


def ring(group: ProcessGroup, tensor: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows of the tensor) of every process, this one first; `sizes` are those of row_counts.

    While a block is used, it goes to the next process and another one comes from the process before. Two are in memory,
    and the next step writes over the one that was used. A process sends R - 1 blocks, as in an all-gather. Blocks have
    no gradient.
    """
    rank, count = torch.distributed.get_rank(group), len(sizes)
    to, source = (torch.distributed.get_global_rank(group, (rank + step) % count) for step in (1, -1))
    block = tensor.new_zeros((max(sizes), *tensor.shape[1:]))  # all of the same size
    block[: len(tensor)] = tensor.detach()
    del tensor  # often the only reference to it
    coming = torch.empty_like(block)
    for step in range(count):
        requests = []
        if step < count - 1:
            operations = [
                torch.distributed.P2POp(torch.distributed.isend, block, to, group),
                torch.distributed.P2POp(torch.distributed.irecv, coming, source, group),
            ]
            requests = torch.distributed.batch_isend_irecv(operations)
        owner = (rank - step) % count
        yield owner, block[: sizes[owner]]
        for request in requests:
            request.wait()
        block, coming = coming, block


def passed_on(group: ProcessGroup, tensor: Tensor) -> Tensor:
    """The tensor of the process before, while this process's goes to the next. It has no gradient."""
    rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    to, source = (torch.distributed.get_global_rank(group, (rank + step) % count) for step in (1, -1))
    coming = torch.empty_like(tensor)
    operations = [
        torch.distributed.P2POp(torch.distributed.isend, tensor, to, group),
        torch.distributed.P2POp(torch.distributed.irecv, coming, source, group),
    ]
    for request in torch.distributed.batch_isend_irecv(operations):
        request.wait()
    return coming


def total(group: ProcessGroup | None, tensor: Tensor) -> Tensor:
    """The differentiable sum over the processes of a group."""
    if group is None or torch.distributed.get_world_size(group) == 1:
        return tensor
    refuse_forward_mode()
    return _Sum.apply(tensor, group)


def refuse_forward_mode() -> None:
    """Raise an error inside torch.func.jvp and the like, whose tangents would not be exchanged."""
    if forward_mode():
        raise NotImplementedError("a call with group= of several processes has no forward-mode derivative")


def row_counts(group: ProcessGroup | None, rows: int, device: torch.device) -> list[int]:
    """The number of rows of each process."""
    if group is None:
        return [rows]
    check_group(group)
    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(counts, torch.full((), rows, dtype=torch.int64, device=device), group=group)
    return torch.stack(counts).tolist()


def check_group(group: Any) -> None:
    """Validate `group` before the first collective call, where the other processes would otherwise wait."""
    available = torch.distributed.is_available()
    if not available or not isinstance(group, torch.distributed.ProcessGroup):
        name = "this build of torch has no torch.distributed" if not available else f"got {type(group).__name__}"
        raise TypeError(f"group must be a torch.distributed process group or None, {name}")
    if torch.distributed.get_rank(group) < 0:
        raise ValueError("group must hold this process, which is not one of its members")


class _Gather(torch.autograd.Function):
    """The rows of all processes. A row's gradient is the sum over the processes, which all have the row."""

    @staticmethod
    def forward(ctx, tensor: Tensor, sizes: list[int], group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        # Collectives need blocks of the same size.
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        blocks = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(blocks, padded, group=group)
        return torch.cat([block[:size] for block, size in zip(blocks, sizes)])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _SumOfOwnRows.apply(gradient, ctx.sizes, ctx.group), None, None


class _SumOfOwnRows(torch.autograd.Function):
    """The gradient of _Gather; its own gradient is _Gather."""

    @staticmethod
    def forward(ctx, gradient: Tensor, sizes: list[int], group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        rank = torch.distributed.get_rank(group)
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=group)
        return gradient.split(sizes)[rank].clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Gather.apply(gradient, ctx.sizes, ctx.group), None, None


class _Sum(torch.autograd.Function):
    """Sum over processes. Its gradient is the same sum, of the incoming gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group) -> Tensor:
        ctx.group = group
        out = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Sum.apply(gradient, ctx.group), None
