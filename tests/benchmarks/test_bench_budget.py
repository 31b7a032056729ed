"""The written budget of traffic against the loads and stores of the kernels, counted in Triton's interpreter."""

import functools
import os

import numpy as np
import pytest
import torch

import fastkl
from bench.budget import SEED, TABLE, budget, launches, touched

from helpers import implementation

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")


class Counted:
    """Bytes that the kernels have loaded and stored: each address once for each load, as a program's threads do."""

    def __init__(self):
        self.bytes = self.seeds = self.kernels = 0

    def count(self, pointers, mask):
        width = pointers.get_element_ty().primitive_bitwidth // 8
        size = width * len(np.unique(pointers.data[mask.data.astype(bool)]))
        if pointers.get_element_ty().is_int64():
            self.seeds += size
        else:
            self.bytes += size

    def take(self):
        found = self.bytes, self.seeds
        self.bytes = self.seeds = 0
        return found


@pytest.fixture
def counted(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    counted, load, store = Counted(), Builder.create_masked_load, Builder.create_masked_store

    def counting_load(self, pointers, mask, *others):
        counted.count(pointers, mask)
        return load(self, pointers, mask, *others)

    def counting_store(self, pointers, value, mask, *others):
        counted.count(pointers, mask)
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(Builder, "create_masked_load", counting_load)
    monkeypatch.setattr(Builder, "create_masked_store", counting_store)
    return counted


def head(x):
    return fastkl.DiagonalNormal.from_packed(x, dim=1)


# Line of the table -> the op, its inputs, and how many of them are data without a gradient.
OPS = {
    "kl_normal": (fastkl.kl_normal, [(64, 64)] * 2, 0),
    "kl_normal, prior": (fastkl.kl_normal, [(64, 64)] * 4, 0),
    "kl_normal_per_dim": (fastkl.kl_normal_per_dim, [(32, 64)] * 2, 0),  # one block of rows: more read dkl again
    "packed": (lambda x: head(x).kl(), [(32, 8, 16)], 0),
    "packed, drawn": (lambda x: head(x).rsample_kl(), [(32, 8, 16)], 0),
    "wasserstein2_normal": (fastkl.wasserstein2_normal, [(64, 64)] * 2, 0),
    "rsample_normal": (fastkl.rsample_normal, [(64, 64)] * 2, 0),
    "rsample_kl": (fastkl.rsample_kl, [(64, 64)] * 2, 0),
    "bernoulli_log_prob": (lambda y, x: fastkl.bernoulli_log_prob(x, y), [(64, 64)] * 2, 1),
    "normal_log_prob": (fastkl.normal_log_prob, [(64, 64)] * 3, 1),
    "gumbel_softmax": (functools.partial(fastkl.gumbel_softmax, tau=0.7), [(64, 64)], 0),
}


def test_every_line_of_the_table_is_counted():
    assert set(OPS) == set(TABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_kernels_move_what_is_written(counted, op, dtype):
    function, shapes, data = OPS[op]
    inputs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    fixed = [inputs.pop(0) for _ in range(data)] if op == "normal_log_prob" else []
    fixed += [inputs.pop() for _ in range(data)] if op == "bernoulli_log_prob" else []
    for tensor in fixed:
        tensor.requires_grad_(False)
    call = [*fixed, *inputs] if op == "normal_log_prob" else [*inputs, *fixed]
    with implementation("triton"):
        outputs = function(*call)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        forward, forward_seeds = counted.take()
        cotangents = [torch.randn_like(out) for out in outputs]
        torch.autograd.grad(outputs, inputs, cotangents)
        backward, backward_seeds = counted.take()
    written, line = budget(op, call, outputs, cotangents), TABLE[op]
    assert forward == written.forward - SEED * line.draws
    assert backward == written.backward - SEED * line.redraws
    # Every program reads the seed, all but the first from a cache. (What is loaded and not used goes when compiled.)
    assert bool(forward_seeds) == line.draws
    assert backward_seeds or not line.redraws


def test_budgets_are_those_of_the_design():
    """In units of one [N, D] tensor, and whatever is one value for each row."""
    n, d = 64, 512
    unit, row = 4 * n * d, 4 * n
    x, kl = torch.empty(n, d), torch.empty(n)
    wanted = [x.clone().requires_grad_() for _ in range(4)]
    assert budget("kl_normal", wanted[:2], [kl], [kl]) == (2 * unit + row, 4 * unit + row)
    assert budget("kl_normal, prior", wanted, [kl], [kl]) == (4 * unit + row, 8 * unit + row)
    assert budget("rsample_normal", wanted[:2], [x], [x]) == (3 * unit + 8, 4 * unit + 8)
    assert budget("rsample_kl", wanted[:2], [x, kl], [x, kl]) == (3 * unit + row + 8, 5 * unit + row + 8)
    # A mean reads what the op wrote, and its gradient is one number for all rows.
    mean, one = torch.empty(()), torch.empty(())
    assert budget("kl_normal", wanted[:2], [mean], [one]) == (2 * unit + 2 * row + 4, 4 * unit + 4)
    assert launches("kl_normal", [kl]) == (1, 1)
    assert launches("rsample_kl", [x, mean]) == (3, 2)  # the seed and the mean


def test_touched_counts_each_element_once():
    x = torch.empty(4, 6)
    assert touched(x) == 96
    assert touched(x[:, :3]) == 48
    assert touched(x[:1].expand(4, 6)) == 24
    assert touched(torch.empty(()).expand(5, 5)) == 4
    assert touched(torch.empty(0, 3)) == 0
