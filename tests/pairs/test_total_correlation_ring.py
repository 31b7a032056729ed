"""Blocks of posteriors, as they go around a ring of processes: what they add up to. `test_group.py` has the ring."""

import pytest
import torch
from test_total_correlation import COTANGENTS, draw, implementation

from fastkl.ops.pairs import _total_correlation_ring as ring

from helpers import DEVICE, launcher

BACKENDS = ("blocks", "native", "triton")
every = pytest.mark.parametrize("backend", BACKENDS)
whole_fwd, whole_bwd = torch.ops.fastkl.total_correlation_fwd, torch.ops.fastkl.total_correlation_bwd
DATASET = 90


class Spread(ring.Spread):
    """Of processes with these numbers of rows, one of which is this one."""

    def __init__(self, sizes, rank, stratified):
        self.sizes, self.rank = sizes, rank
        self.starts, self.total = [sum(sizes[:end]) for end in range(len(sizes) + 1)], sum(sizes)
        self.first, self.dataset_size, self.stratified = self.starts[rank], DATASET, stratified


def rows_of(spread, rank, *tensors):
    return [tensor[spread.starts[rank] : spread.starts[rank + 1]] for tensor in tensors]


def around(sizes, stratified, tensors):
    """The sums of every row, then the gradients in z, mu and logvar, by blocks."""
    spreads, tensors = [Spread(sizes, rank, stratified) for rank in range(len(sizes))], [t.detach() for t in tensors]
    cotangents = [torch.linspace(a, b, len(tensors[0]), device=DEVICE).to(tensors[0].dtype) for a, b in COTANGENTS]
    sums, gradients = [], [torch.zeros_like(tensor) for tensor in tensors]
    for rank, spread in enumerate(spreads):
        own = rows_of(spread, rank, *tensors)
        blocks = [rows_of(spread, source, *tensors[1:]) for source in range(len(sizes))]
        parts = [ring.block_fwd(*own, *block, *spread.settings(source)) for source, block in enumerate(blocks)]
        sums.append([sum(part) for part in zip(*parts)])
        for source, block in enumerate(blocks):
            found = [torch.empty_like(each) for each in (own[0], *block)]
            given = rows_of(spread, rank, *cotangents)
            ring.block_bwd(*given, *own, *block, *sums[-1], *found, *spread.settings(source))
            into = [*rows_of(spread, rank, gradients[0]), *rows_of(spread, source, *gradients[1:])]
            for total, part in zip(into, found):
                total += part
    return [*(torch.cat(part) for part in zip(*sums)), *gradients]


def whole(stratified, tensors):
    tensors = [t.detach() for t in tensors]
    cotangents = [torch.linspace(a, b, len(tensors[0]), device=DEVICE).to(tensors[0].dtype) for a, b in COTANGENTS]
    found, gradients = (
        whole_fwd(*tensors, 0, DATASET, stratified),
        [torch.empty_like(tensor) for tensor in tensors],
    )
    whole_bwd(*cotangents, *tensors, *found[3:], *gradients, 0, DATASET, stratified)
    return [*found[3:], *gradients]


@every
@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(
    ("sizes", "d"),
    [
        ((3, 4), 3),  # the last row's next posterior is the first, in another block
        ((1, 1), 1),  # the smallest batch
        ((1, 5, 2, 1), 10),  # single rows, whose next one is always elsewhere
        ((40, 17), 6),  # several tiles
    ],
)
def test_blocks_add_up_to_the_whole_batch(backend, sizes, d, stratified):
    tensors = draw(sum(sizes), d, torch.float64, spread=0.3)  # near one another, so that every pair counts
    with implementation(backend):
        for actual, expected in zip(around(sizes, stratified, tensors), whole(stratified, tensors)):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@every
def test_a_posterior_that_outweighs_all_others_has_a_share_of_one(backend):
    """Apart and narrow, each row has its own posterior alone: the gradient of mutual information is that of the own
    term minus that of the sum, which cancel."""
    tensors = draw(7, 6, spread=9.0, logvar=-12.0)
    with implementation(backend):
        joint, _, *found = around((3, 4), False, tensors)
        expected = whole(False, tensors)
        torch.testing.assert_close(joint, torch.ones_like(joint), rtol=1e-5, atol=0)
        for actual, each in zip(found, expected[2:]):
            torch.testing.assert_close(actual, each, rtol=1e-5, atol=1e-5)


@every
def test_blocks_in_float32_are_read_where_they_lie(backend):
    """The halves of a block that holds mu and logvar side by side."""
    z, mu, logvar = (tensor.detach() for tensor in draw(6, 4))
    block, spread = torch.cat([mu, logvar], 1), Spread([6, 6], 0, True)
    with implementation(backend):
        plain = ring.block_fwd(z, mu, logvar, mu, logvar, *spread.settings(1))
        for actual, expected in zip(ring.block_fwd(z, mu, logvar, *block.chunk(2, 1), *spread.settings(1)), plain):
            assert torch.equal(actual, expected)


def aot_calls():
    fwd, bwd = launcher("total_correlation.block_fwd"), launcher("total_correlation.block_bwd")
    calls = {}

    def add(name, n, d, dtype=torch.float32, stratified=True, first=0):
        z = torch.empty(n, d, dtype=dtype)
        block, row = torch.empty(n, 2 * d, dtype=dtype).chunk(2, 1), torch.empty(n, dtype=dtype)
        rows, settings = (z, z, z, *block), (first, 60000, stratified, n - first, 4 * n)
        calls[f"{name} fwd"] = lambda: fwd(*rows, *settings)
        calls[f"{name} bwd"] = lambda: bwd(row, row, row, *rows, row, torch.ones_like(z), z, *block, *settings)

    add("core aligned float32", 256, 32)
    add("another block, uniform weights", 256, 10, torch.float32, False, -256)
    add("float64", 256, 32, torch.float64)
    return calls
