"""The memory traffic of fastkl's kernels: the tensors that each reads and writes, once.

Other ops read their inputs again for every tile of components or pairs, mostly from L2.
tests/benchmarks/test_bench_budget.py compares the figures with counted loads and stores.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SEED = 8


class Budget(NamedTuple):
    """Bytes that the kernels of an op move, forward and backward."""

    forward: int
    backward: int

    @property
    def both(self) -> int:
        return self.forward + self.backward


class Traffic(NamedTuple):
    """Traffic beyond that of every op: forward reads all inputs and writes all outputs, backward reads the cotangents
    and writes the requested gradients."""

    backward_reads: tuple[int, ...]  # indices of the inputs that backward reads
    draws: bool = False  # forward reads a seed
    redraws: bool = False  # backward reads it again
    rereads_output: bool = False  # the output is saved and read in the backward pass


TABLE = {
    "kl_normal": Traffic((0, 1)),
    "kl_normal, prior": Traffic((0, 1, 2, 3)),
    "packed": Traffic((0,)),
    "packed, drawn": Traffic((0,), draws=True, redraws=True),
    "kl_normal_per_dim": Traffic((0, 1)),  # without the sums of blocks of rows, some hundredths of it
    "wasserstein2_normal": Traffic((0, 1)),
    "rsample_normal": Traffic((1,), draws=True, redraws=True),
    "rsample_kl": Traffic((0, 1), draws=True, redraws=True),
    "bernoulli_log_prob": Traffic((0, 1)),
    "normal_log_prob": Traffic((0, 1, 2)),
    "gumbel_softmax": Traffic((), draws=True, rereads_output=True),
}


def touched(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded dimension counts as one element."""
    if tensor.numel() == 0:
        return 0
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= 1 if stride == 0 else size
    return count * tensor.element_size()


def budget(op: str, inputs: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor]) -> Budget:
    """The budget of an op for tensors of these shapes."""
    line = TABLE[op]
    forward = SEED * line.draws + sum(map(touched, (*inputs, *outputs)))
    # A mean after the op writes and reads one value per row.
    forward += sum(2 * out.element_size() * len(inputs[0]) for out in outputs if out.dim() == 0)
    read = [*(inputs[number] for number in line.backward_reads), *cotangents, *(outputs * line.rereads_output)]
    gradients = sum(x.numel() * x.element_size() for x in inputs if x.requires_grad)
    return Budget(forward, SEED * line.redraws + sum(map(touched, read)) + gradients)


def launches(op: str, outputs: list[Tensor]) -> tuple[int, int]:
    """(forward launches, backward launches): one kernel each; drawing the seed adds one to forward, a mean after the op
    adds one to each. (The second stage of a sum over few long rows, split over programs, is not counted.)"""
    means = sum(out.dim() == 0 for out in outputs)
    return 1 + TABLE[op].draws + means, 1 + means
