"""The traffic of fastkl's kernels as it is written down: what each reads and writes, once. tests/test_bench_budget.py
counts the loads and stores of the kernels and compares.

Ops that are not here read their inputs again for every tile of components or pairs, mostly from L2.
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
    """Beside what every op does: forward reads all inputs and writes all outputs, backward reads what comes back for
    each output and writes the gradients that are wanted."""

    backward_reads: tuple[int, ...]  # which inputs, by number
    draws: bool = False  # reads a seed
    redraws: bool = False  # reads it again in the backward pass
    rereads_output: bool = False  # keeps its output and reads it in the backward pass


TABLE = {
    "kl_normal": Traffic((0, 1)),
    "kl_normal, prior": Traffic((0, 1, 2, 3)),
    "packed": Traffic((0,)),
    "packed, drawn": Traffic((0,), draws=True, redraws=True),
    "kl_normal_per_dim": Traffic((0, 1)),  # and sums of blocks of rows, hundredths of all that
    "wasserstein2_normal": Traffic((0, 1)),
    "rsample_normal": Traffic((1,), draws=True, redraws=True),
    "rsample_kl": Traffic((0, 1), draws=True, redraws=True),
    "bernoulli_log_prob": Traffic((0, 1)),
    "normal_log_prob": Traffic((0, 1, 2)),
    "gumbel_softmax": Traffic((), draws=True, rereads_output=True),
}


def touched(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor, each once: an expanded dimension is one element long."""
    if tensor.numel() == 0:
        return 0
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= 1 if stride == 0 else size
    return count * tensor.element_size()


def budget(op: str, inputs: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor]) -> Budget:
    """The table's line for tensors of these shapes."""
    line = TABLE[op]
    forward = SEED * line.draws + sum(map(touched, (*inputs, *outputs)))
    # A mean behind the op reads its one value per row once more.
    forward += sum(2 * out.element_size() * len(inputs[0]) for out in outputs if out.dim() == 0)
    read = [*(inputs[number] for number in line.backward_reads), *cotangents, *(outputs * line.rereads_output)]
    gradients = sum(x.numel() * x.element_size() for x in inputs if x.requires_grad)
    return Budget(forward, SEED * line.redraws + sum(map(touched, read)) + gradients)


def launches(op: str, outputs: list[Tensor]) -> tuple[int, int]:
    """One kernel each way; drawing the seed is another, and so is a mean behind the op, each way. (The second stage of
    a sum over few long rows, which many programs share, is not counted.)"""
    means = sum(out.dim() == 0 for out in outputs)
    return 1 + TABLE[op].draws + means, 1 + means
