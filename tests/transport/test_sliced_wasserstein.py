"""sliced_wasserstein against the float64 definition and POT."""

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.transport import sliced_wasserstein as transport

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, implementation, leaf, peak_bytes

ot = Package("ot")

SEED = torch.tensor(3)


def draw(n, m, dimensions=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, dimensions, generator=generator, dtype=torch.float64) for rows in (n, m))
    return [leaf(points.to(dtype)) for points in (x, 0.5 * y + 1)]


def run(function, tensors, *arguments):
    value = function(*tensors, *arguments)
    return [value, *torch.autograd.grad(value, tensors)]


# (n, m, dimensions, projections): why
SHAPES = [
    (20, 20, 3, 30),  # equal sizes: no merging
    (20, 15, 3, 30),  # quantiles merged; 5 steps coincide
    (7, 20, 3, 30),  # coprime, the other way round
    (1, 1, 3, 30),  # two points
    (1, 9, 3, 30),
    (50, 40, 1, 2),  # one dimension, where every direction is the same
]


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, p):
    *sizes, projections = shape
    for dtype in (torch.float32, torch.float64):
        tensors, arguments = draw(*sizes, dtype=dtype), (projections, p, SEED.to(DEVICE))
        actual, eager = (run(m.sliced_wasserstein, tensors, *arguments) for m in (fastkl, reference))
        exact = run(reference.sliced_wasserstein, [leaf(t.double()) for t in tensors], *arguments)
        for got, naive, truth in zip(actual, eager, exact):
            assert_as_good_as_eager(got, naive, truth, units=16.0, scale=truth.abs().max())


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(20, 20), (20, 15)])
def test_agrees_with_pot(sizes, p):
    """POT returns the p-th root; the directions are the same on every device and in every precision."""
    x, y = draw(*sizes, dtype=torch.float64)
    unit = reference.projections(SEED, 25, 3, torch.float64)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones_like(unit[:, 0]))
    points = [t.detach().cpu() for t in (x, y)]
    expected = ot.sliced_wasserstein_distance(*points, projections=unit.T.contiguous(), p=p) ** p
    actual = fastkl.sliced_wasserstein(x, y, 25, p, seed=3)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)  # the noise is float32's
    assert torch.equal(actual, fastkl.sliced_wasserstein(x, y, 25, p, SEED.to(DEVICE)))
    assert not torch.equal(actual, fastkl.sliced_wasserstein(x, y, 25, p))


def test_kernels_draw_the_directions_as_well():
    with implementation("triton"):
        actual = run(fastkl.sliced_wasserstein, draw(9, 7), 8, 2, SEED.to(DEVICE))
    torch.testing.assert_close(actual, run(reference.sliced_wasserstein, draw(9, 7), 8, 2, SEED.to(DEVICE)))


def test_masses_are_merged_in_integers():
    """POT adds up masses 1 / n, whose rounding in float32 makes it find pieces that are not there, and miss some: the
    distance of a sample to the same sample with every point seven times is 0, and POT's is not."""
    x = draw(1000, 1)[0].detach()
    repeated = x.repeat_interleave(7, 0)
    assert fastkl.sliced_wasserstein(x, repeated, 10, seed=0) == 0
    assert ot.sliced_wasserstein_distance(x.cpu(), repeated.cpu(), n_projections=10, seed=0) > 1e-5


def test_same_sample_has_no_distance_and_no_gradient():
    x = draw(40, 1)[0]
    for p in (1, 1.5, 2):
        value, *gradients = run(fastkl.sliced_wasserstein, [x, leaf(x.flip(0))], 10, p)
        assert value == 0
        assert all((g == 0).all() for g in gradients)


def test_order_of_special_values():
    """The sort by integers: signs, zeros of either sign, infinity, and numbers that are subnormal."""
    values = torch.tensor([[3.0, -0.0, 1e-40, -1e-40, 0.0, -2.0, float("inf"), -float("inf"), -3e38]])
    ascending, order = transport._sort(values)
    assert ascending.tolist() == values.sort(-1).values.tolist()
    assert torch.equal(values.gather(1, order), ascending)
    assert fastkl.sliced_wasserstein(torch.tensor([[float("nan")], [1.0]]), torch.ones(2, 1), 3).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    tensors = draw(12, 10, dtype=dtype)
    value, *gradients = run(fastkl.sliced_wasserstein, tensors, 6, 2, SEED.to(DEVICE))
    expected = run(reference.sliced_wasserstein, tensors, 6, 2, SEED.to(DEVICE))
    assert value.dtype == reference.compute_dtype(*tensors)
    assert [g.dtype for g in gradients] == [dtype] * 2
    torch.testing.assert_close([value, *gradients], expected)
    (only,) = torch.autograd.grad(fastkl.sliced_wasserstein(tensors[0], tensors[1].detach(), 6, seed=3), tensors[0])
    assert torch.equal(only, gradients[0])
    (only,) = torch.autograd.grad(fastkl.sliced_wasserstein(*tensors, 6, seed=3), tensors[1])
    assert torch.equal(only, gradients[1])


@pytest.mark.skipif(DEVICE == "cuda", reason="the profiler's account of CPU memory")
def test_memory_is_bounded_by_blocks_of_projections():
    tensors = draw(2048, 2048, 2)
    peak = peak_bytes(lambda: run(fastkl.sliced_wasserstein, tensors, 512, 2, SEED))
    assert peak < 40 * 2**20  # one block would take 96
    tensors = [leaf(t.double()) for t in tensors]  # in which no two points are so close that rounding swaps them
    blocks = run(fastkl.sliced_wasserstein, tensors, 512, 2, SEED)
    whole = run(reference.sliced_wasserstein, tensors, 512, 2, SEED)
    for got, truth in zip(blocks, whole):
        torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("shapes", "arguments", "error", "match"),
    [
        ([(3, 2), (3,)], (5,), ValueError, r"y must be points \[N, D\]"),
        ([(0, 2), (3, 2)], (5,), ValueError, r"x must have at least one point .* got \(0, 2\)"),
        ([(3, 2), (3, 4)], (5,), ValueError, r"as many dimensions, got \(3, 2\) and \(3, 4\)"),
        ([(3, 2), (3, 2)], (0,), ValueError, "num_projections must be at least 1"),
        ([(3, 2), (3, 2)], (5.0,), TypeError, "num_projections must be an int"),
        ([(3, 2), (3, 2)], (5, 0.5), ValueError, "p must be at least 1, got 0.5"),
        ([(3, 2), (3, 2)], (5, "2"), TypeError, "p must be a number"),
        ([(3, 2), (3, 2)], (5, 2, 1.0), TypeError, "seed must be an int"),
    ],
)
def test_errors_name_the_argument(shapes, arguments, error, match):
    with pytest.raises(error, match=match):
        fastkl.sliced_wasserstein(*(torch.ones(shape) for shape in shapes), *arguments)
