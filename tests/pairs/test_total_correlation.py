"""total_correlation: both implementations against the float64 definition, torch.distributions, and others' weights."""

import contextlib
from unittest import mock

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.pairs import _few_pairs_normal as few_pairs

import helpers
from helpers import DEVICE, DTYPES, assert_as_good_as_eager, launcher, leaf, peak_bytes

# (N, D): why
SHAPES = [
    (2, 1),  # the smallest batch, whose other posterior is also the next; one dimension
    (5, 3),  # less than any tile
    (20, 10),  # several tiles of posteriors, masked dimensions, the last row's next is the first
    (6, 32),  # whole dimensions
    (3, 200),  # many dimensions
]
every = pytest.mark.parametrize("backend", ["all pairs", "blocks", "native", "triton"])


@contextlib.contextmanager
def implementation(backend):
    """The closed form of few pairs, or of blocks so small that tests have several; the loops in C; the kernels."""
    with contextlib.ExitStack() as stack:
        if backend == "blocks":
            stack.enter_context(mock.patch("fastkl.ops.pairs._few_pairs_normal.MOST", 0))
            stack.enter_context(mock.patch("fastkl.ops.pairs._pairwise_normal.BLOCK", 480))
            stack.enter_context(mock.patch("fastkl.ops.pairs._pairwise_normal.MOST_COLUMNS", 16))
        stack.enter_context(helpers.implementation(backend if backend in ("native", "triton") else "torch"))
        yield


def draw(n, d, dtype=torch.float32, *, logvar=-2.0, mean=0.0, spread=1.0, seed=0):
    """z is drawn from its own posterior."""
    generator = torch.Generator().manual_seed(seed)
    mu, logvars, eps = (torch.randn(n, d, generator=generator) for _ in range(3))
    mu, logvars = mean + spread * mu, logvar + logvars
    return [leaf(tensor.to(dtype)) for tensor in (mu + (0.5 * logvars).exp() * eps, mu, logvars)]


def run(function, tensors, dataset_size=1000, weights="mss"):
    parts = function(*tensors, dataset_size, weights=weights)
    cotangents = [torch.linspace(a, b, len(tensors[0]), device=DEVICE).to(parts[0].dtype) for a, b in COTANGENTS]
    return [*parts, *torch.autograd.grad(parts, tensors, cotangents)]


COTANGENTS = ((1, 2), (-3, 6), (0.5, -1))


def check(tensors, **settings):
    exact_tensors = [leaf(t.double()) for t in tensors]
    exact = run(reference.total_correlation, exact_tensors, **settings)
    eager = run(reference.total_correlation, tensors, **settings)
    actual = run(fastkl.total_correlation, tensors, **settings)
    # Relative to the gradients of the joint and of the marginals, each by itself: together they may cancel.
    parts = reference.total_correlation(*exact_tensors, 1000, **settings)
    each = [torch.autograd.grad(8 * parts[i].sum(), exact_tensors, retain_graph=True) for i in (0, 2)]
    scales = [sum(part.abs().max() for part in exact[:3])] * 3 + [a.abs().max() + b.abs().max() for a, b in zip(*each)]
    for got, naive, truth, scale in zip(actual, eager, exact, scales):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=scale)
    assert [t.dtype for t in actual] == [reference.compute_dtype(*tensors)] * 3 + [t.dtype for t in tensors]


@every
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_shapes(backend, n, d):
    with implementation(backend):
        check(draw(n, d))


@every
@pytest.mark.parametrize(("n", "d"), SHAPES[:2])
def test_uniform_weights(backend, n, d):
    with implementation(backend):
        check(draw(n, d), weights="mws")


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype):
    with implementation(backend):
        check(draw(6, 5, dtype))


@every
@pytest.mark.parametrize(
    "case", [{"logvar": -12.0}, {"mean": 100.0}, {"mean": 100.0, "logvar": -12.0}, {"spread": 9.0}]
)
def test_narrow_posteriors_and_far_means(backend, case):
    with implementation(backend):
        check(draw(7, 6, **case))


@every
def test_samples_far_from_their_own_posterior(backend):
    """Exponentials relative to their own overflow there; the other rows go on as before."""
    z, mu, logvar = draw(8, 4)
    z = z.detach().clone()
    z[3] += 90.0
    z[6] -= 300.0
    z = leaf(z)
    with implementation(backend):
        check([z, mu, logvar])
        check([z, mu, logvar], weights="mws")


@every
def test_a_part_of_the_batch_has_its_rows_of_the_whole(backend):
    """As processes of a group have, whose posteriors are everybody's."""
    z, mu, logvar = (tensor.detach() for tensor in draw(7, 3))
    forward, backward = torch.ops.fastkl.total_correlation_fwd, torch.ops.fastkl.total_correlation_bwd
    cotangents = [torch.linspace(a, b, 7, device=DEVICE) for a, b in COTANGENTS]
    with implementation(backend):
        whole = forward(z, mu, logvar, 0, 50, True)
        gradients = [torch.empty_like(tensor) for tensor in (z, mu, logvar)]
        backward(*cotangents, z, mu, logvar, *whole[3:], *gradients, 0, 50, True)
        of_posteriors = []
        for first, last in ((0, 3), (3, 7)):
            part = forward(z[first:last], mu, logvar, first, 50, True)
            for actual, full in zip(part, whole):
                torch.testing.assert_close(actual, full[first:last])
            given, rows = [cotangent[first:last] for cotangent in cotangents], z[first:last]
            dz, *others = [torch.empty_like(tensor) for tensor in (rows, mu, logvar)]
            backward(*given, rows, mu, logvar, *part[3:], dz, *others, first, 50, True)
            torch.testing.assert_close(dz, gradients[0][first:last])
            of_posteriors.append(others)
        for *parts, full in zip(*of_posteriors, gradients[1:]):
            torch.testing.assert_close(sum(parts), full)


@every
def test_strided_inputs_are_read_where_they_lie(backend):
    z, mu, logvar = (tensor.detach() for tensor in draw(6, 4))
    head = torch.cat([mu, logvar], 1)
    views = ((z.t().contiguous().t(), *head.chunk(2, 1)), (z, head[:, :4], logvar[:1].expand(6, 4)))
    with implementation(backend):
        for tensors in views:
            plain = run(fastkl.total_correlation, [leaf(t.clone()) for t in tensors])
            torch.testing.assert_close(run(fastkl.total_correlation, [t.requires_grad_() for t in tensors]), plain)
            [t.requires_grad_(False) for t in tensors]


@every
def test_parts_add_up_to_the_sampled_kl(backend):
    z, mu, logvar = draw(7, 4, torch.float64)
    with implementation(backend):
        total = sum(fastkl.total_correlation(z, mu, logvar, 600))
    q, p = torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(total, (q.log_prob(z) - p.log_prob(z)).sum(1))


def test_few_pairs_leave_rows_far_from_their_own_to_the_blocks():
    """Forward by the sums' overflow, backward by the sign that the joint's then has."""
    z, mu, logvar = (tensor.detach() for tensor in draw(8, 4))
    z[3] += 90.0
    pairs = few_pairs.Pairs(z, mu, logvar, 0, 100, True)
    assert few_pairs.forward(pairs) is None
    z[3] -= 90.0
    assert few_pairs.forward(few_pairs.Pairs(z, mu, logvar, 0, 100, True)) is not None


@pytest.mark.skipif(DEVICE == "cuda", reason="the allocator of the CPU")
@pytest.mark.parametrize("backend", ["all pairs", "native"])
def test_memory_stays_small(backend):
    """All pairs of 128 rows in 64 dimensions would take 4 MiB for each of a dozen temporaries."""
    tensors = draw(128, 64)
    with implementation(backend):
        assert peak_bytes(lambda: run(fastkl.total_correlation, tensors)) < 2**21


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", ["mss", "mws"])
def test_blocks_and_threads_change_no_bit_in_c(weights, dtype):
    """Blocks of 64 rows, and of 256, 128 or fewer posteriors."""
    before, results = torch.get_num_threads(), []
    tensors = draw(150, 60, dtype)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(fastkl.total_correlation, tensors, weights=weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    with implementation("all pairs"):
        expected = run(fastkl.total_correlation, [leaf(t.double()) for t in tensors], weights=weights)
    rtol = 100 * torch.finfo(dtype).eps
    for actual, exact in zip(results[0], expected):
        torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=rtol * exact.abs().max().item())


def test_saves_two_sums_beyond_its_inputs_and_repeats_bit_for_bit():
    tensors, saved = draw(6, 3), []
    with implementation("triton"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            fastkl.total_correlation(*tensors, 99)
        first, second = run(fastkl.total_correlation, tensors), run(fastkl.total_correlation, tensors)
    inputs = {tensor.data_ptr() for tensor in tensors}
    assert sum(t.numel() for t in saved if t.data_ptr() not in inputs) == 6 * 3 + 6
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_errors_name_the_argument():
    z = torch.zeros(4, 2)
    for arguments, error in (
        ((z[:1], z[:1], z[:1], 9), r"z must have 2 rows or more, got 1"),
        ((z, z, z, 3), r"dataset_size must be at least the batch's 4, got 3"),
        ((z[0], z[0], z[0], 9), r"z must be \[N, D\]"),
        ((z, z[:3], z, 9), r"mu \(3, 2\) does not broadcast to z's shape \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=error):
            fastkl.total_correlation(*arguments)
    with pytest.raises(ValueError, match=r"weights must be one of 'mss', 'mws', got 'all'"):
        fastkl.total_correlation(z, z, z, 9, weights="all")
    with pytest.raises(TypeError, match="dataset_size must be an int"):
        fastkl.total_correlation(z, z, z, 9.5)
    with pytest.raises(TypeError, match="group must be"):
        fastkl.total_correlation(z, z, z, 9, group="world")


def aot_calls():
    fwd, bwd = launcher("total_correlation.fwd"), launcher("total_correlation.bwd")
    calls = {}

    def add(name, n, d, dtype=torch.float32, stratified=True):
        z = torch.empty(n, d, dtype=dtype)
        inputs, settings = (z, z, z), (0, 60000, stratified)
        result = torch.float64 if dtype == torch.float64 else torch.float32
        row, sums = torch.empty(n, dtype=result), torch.ones(n, d, dtype=result)
        calls[f"{name} fwd"] = lambda: fwd(*inputs, *settings)
        calls[f"{name} bwd"] = lambda: bwd(row, row, row, *inputs, row, sums, *inputs, *settings)

    add("core aligned float32", 256, 32)
    add("many rows", 16384, 32)
    add("bfloat16 few dimensions, uniform weights", 256, 10, torch.bfloat16, False)
    add("float64", 256, 32, torch.float64)
    add("many dimensions", 256, 512)
    add("float64 many dimensions", 256, 512, torch.float64)
    add("one dimension", 256, 1)
    return calls
