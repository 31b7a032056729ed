"""mmd: its implementations against the float64 definition and geomloss, and defects of other libraries."""

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.pairs import _pairs

from helpers import DEVICE, DTYPES, assert_as_good_as_eager, implementation, launcher, leaf, peak_bytes

every = pytest.mark.parametrize("backend", ["torch", "native", "triton"])
kernels = pytest.mark.parametrize("kernel", reference.MMD_KERNELS)
# (N, M, D): why
SHAPES = [
    (64, 32, 16),  # whole tiles
    (33, 70, 5),  # parts of tiles, odd dimensions
    (2, 3, 1),  # the fewest, one dimension
    (5, 4, 12),  # several steps over the dimensions
    (130, 2, 33),  # blocks of unequal size
]


def draw(n, m, d, dtype=torch.float32, far=0.0):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=generator) + far, 1.2 * torch.randn(m, d, generator=generator) + far
    return [leaf(x.to(dtype)), leaf(y.to(dtype))]


def run(function, tensors, **settings):
    value = function(*tensors, **settings)
    return [value, *torch.autograd.grad(3 * value, tensors)]


def check(function, definition, tensors, **settings):
    exact = run(definition, [leaf(t.double()) for t in tensors], **settings)
    eager, actual = run(definition, tensors, **settings), run(function, tensors, **settings)
    # A discrepancy is a small difference of means of kernels, which are what is rounded.
    assert_as_good_as_eager(actual[0], eager[0], exact[0], scale=float(len(settings.get("scales", range(7)))))
    for got, naive, truth in zip(actual[1:], eager[1:], exact[1:]):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=truth.abs().max())
    assert [t.dtype for t in actual] == [reference.compute_dtype(*tensors), *(t.dtype for t in tensors)]


@every
@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, kernel, shape):
    estimator = reference.MMD_ESTIMATORS[(kernel == "imq") ^ (shape[0] % 2)]
    with implementation(backend):
        check(fastkl.mmd, reference.mmd, draw(*shape), kernel=kernel, estimator=estimator)


@every
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, kernel, dtype):
    with implementation(backend):
        check(fastkl.mmd, reference.mmd, draw(9, 7, 6, dtype), kernel=kernel, scales=(2.0, 1.0, 0.3))


@every
def test_mixed_dtypes_strides_and_images(backend):
    x, y = torch.randn(6, 9, 4, device=DEVICE), torch.randn(4, 7, device=DEVICE, dtype=torch.float64).t()
    with implementation(backend):
        for a, b in ((x[:, 1::2], x[:, ::2][:5, :4]), (x[0, :, :].t(), x[1, :, :].t()), (x[0], y[:1].expand(9, 4))):
            expected = reference.mmd(a.double(), b.double())
            torch.testing.assert_close(fastkl.mmd(a, b).double(), expected, rtol=1e-5, atol=1e-6)


@every
def test_only_one_side_wants_a_gradient(backend):
    x, y = draw(70, 9, 4)  # several tiles of rows
    with implementation(backend):
        full = torch.autograd.grad(fastkl.mmd(x, y), (x, y))
        for estimator in reference.MMD_ESTIMATORS:  # a kernel then goes through half of the pairs
            exact = reference.mmd(x.double(), y.double(), estimator=estimator).float()
            torch.testing.assert_close(fastkl.mmd(x.detach(), y.detach(), estimator=estimator), exact)
        for position in range(2):
            tensors = [x.detach(), y.detach()]
            tensors[position] = leaf(tensors[position])
            (alone,) = torch.autograd.grad(fastkl.mmd(*tensors), tensors[position])
            torch.testing.assert_close(alone, full[position], rtol=1e-5, atol=1e-7)


@kernels
@pytest.mark.parametrize(("far", "spread"), [(1000.0, 0.0), (0.0, 100.0), (0.0, 1e6)])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_points_far_from_the_origin_and_from_each_other(backend, kernel, far, spread):
    """A product of matrices loses the digits of small distances between points of large norms."""
    x, y = draw(60, 50, 3, far=far)
    for points in (x, y):
        points.data += spread * (torch.arange(len(points), device=DEVICE) % 2).unsqueeze(1)
    with implementation(backend):
        check(fastkl.mmd, reference.mmd, [x, y], kernel=kernel)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_and_threads_change_no_bit_in_c(kernel, dtype):
    """Blocks have 128 points, 64 in float64; an odd number of them leaves one out of each round."""
    before, tensors = torch.get_num_threads(), draw(300, 200, 20, dtype)
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(fastkl.mmd, tensors, kernel=kernel))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    with implementation("torch"):  # another method
        expected = run(fastkl.mmd, [leaf(t.double()) for t in tensors], kernel=kernel)
    rtol = 100 * torch.finfo(dtype).eps
    for actual, exact in zip(found[0], expected):
        torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=rtol * exact.abs().max().item())


@every
@kernels
def test_an_infinite_distance_counts_nothing_and_nan_stays(backend, kernel):
    x, y = draw(6, 5, 3)
    x.data[2], y.data[1] = 1e30, -1e30  # their squares overflow
    with implementation(backend):
        assert all(part.isfinite().all() for part in run(fastkl.mmd, [x, y], kernel=kernel))
        y.data[1, 1] = torch.nan
        assert fastkl.mmd(x, y, kernel=kernel).isnan()


def test_several_blocks(monkeypatch):
    monkeypatch.setattr(_pairs, "BLOCK", 16)
    monkeypatch.setattr(_pairs, "SUMMED", 5)
    with implementation("torch"):
        for kernel in reference.MMD_KERNELS:
            for estimator in reference.MMD_ESTIMATORS:
                check(fastkl.mmd, reference.mmd, draw(50, 33, 4), kernel=kernel, estimator=estimator)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_value_near_zero_to_float64s_digits(backend):
    """Samples of the same distribution: the unbiased estimate is 1e-4 of the means that it is a difference of."""
    x, y = (torch.randn(1500, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    with implementation(backend):
        for kernel in reference.MMD_KERNELS:
            exact = fastkl.mmd(x.double(), y.double(), kernel=kernel)
            assert abs(fastkl.mmd(x, y, kernel=kernel).double() - exact) < 5e-8


def test_agrees_with_geomloss():
    geomloss = pytest.importorskip("geomloss")
    x, y = (leaf(t.detach().cpu().double()) for t in draw(40, 30, 5))
    for s in (0.3, 1.0):  # geomloss: half the biased discrepancy, exp(-d^2 / (2 blur^2))
        theirs = 2 * geomloss.SamplesLoss("gaussian", blur=(5 * s) ** 0.5, backend="tensorized")(x.cpu(), y.cpu())
        ours = fastkl.mmd(x, y, kernel="rbf", scales=[s], estimator="biased")
        torch.testing.assert_close(ours.cpu(), theirs)
        torch.testing.assert_close(
            [g.cpu() for g in torch.autograd.grad(ours, (x, y))], list(torch.autograd.grad(theirs, (x, y)))
        )


@every
def test_rbf_is_normalised_once(backend):
    """AntixK/PyTorch-VAE averages d^2 over the D dimensions and divides by D again: exp(-d^2 / D^2) is 1 for all pairs
    of a large latent, and samples of any two distributions look the same. Here it depends on d^2 / D alone."""

    def twice(x, y):
        k = [
            torch.exp(-(a.unsqueeze(1) - b).square().mean(-1) / x.shape[1]).mean() for a, b in ((x, x), (y, y), (x, y))
        ]
        return k[0] + k[1] - 2 * k[2]

    found = {"twice": [], "once": []}
    for d in (4, 64):
        x, y = torch.randn(2, 40, d, generator=torch.Generator().manual_seed(d)).to(DEVICE)
        with implementation(backend):
            once = fastkl.mmd(x, 2 * y, kernel="rbf", scales=[1.0], estimator="biased")
        found["once"].append(once.item())
        found["twice"].append(twice(x, 2 * y).item())
    assert found["twice"][1] < 0.1 * found["twice"][0]  # the defect is real
    assert found["once"][1] > 0.5 * found["once"][0]


def test_vmap_keeps_its_dimension_out_of_the_pairs():
    x, y = (torch.randn(3, n, 4, dtype=torch.float64, device=DEVICE, requires_grad=True) for n in (5, 6))
    mapped, looped = torch.func.vmap(fastkl.mmd)(x, y), torch.stack([fastkl.mmd(*each) for each in zip(x, y)])
    torch.testing.assert_close(mapped, looped)
    torch.testing.assert_close(*[torch.autograd.grad(value.square().sum(), (x, y)) for value in (mapped, looped)])
    shared = torch.func.vmap(torch.func.grad(fastkl.mmd), (0, None))(x, y[0])
    torch.testing.assert_close(shared[1], torch.autograd.grad(fastkl.mmd(x[1], y[0]), x)[0][1])


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's memory")
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_nothing_of_the_size_of_the_pairs(backend):
    tensors = draw(3000, 3000, 8)  # 36 MB in float32
    with implementation(backend):
        assert peak_bytes(lambda: run(fastkl.mmd, tensors)) < 8 << 20


@every
def test_repeats_bit_for_bit_and_saves_gradients_only(backend):
    tensors, saved = draw(40, 5, 4), []
    with implementation(backend):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            fastkl.mmd(*tensors)
        first, second = run(fastkl.mmd, tensors), run(fastkl.mmd, tensors)
    assert sum(saved) <= 2 * sum(t.numel() for t in tensors) + 2
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_bad_arguments():
    x = torch.zeros(3, 4)
    bad = {
        "same dimensions": lambda: fastkl.mmd(x, x[:, :2]),
        "must be \\[N, D\\]": lambda: fastkl.mmd(x[0], x),
        "x must have at least 2 rows": lambda: fastkl.mmd(x[:1], x),
        "y must have at least 1 row,": lambda: fastkl.mmd(x, x[:0], estimator="biased"),
        "at least one number": lambda: fastkl.mmd(x, x, scales=()),
        "scales must be a finite number above 0": lambda: fastkl.mmd(x, x, scales=(1.0, 0.0)),
        "kernel must be one of 'imq', 'rbf'": lambda: fastkl.mmd(x, x, kernel="laplace"),
        "estimator must be one of": lambda: fastkl.mmd(x, x, estimator="linear"),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
    for message, call in {
        "sequence of numbers, got float": lambda: fastkl.mmd(x, x, scales=1.0),
        "got dtype torch.int64": lambda: fastkl.mmd(x, x.long()),
        "group must be": lambda: fastkl.mmd(x, x, group=1),
    }.items():
        with pytest.raises(TypeError, match=message):
            call()


def aot_calls():
    launch, beside = launcher("mmd.launch"), launcher("mmd.beside")
    calls = {}

    def add(name, kernel, n=512, d=64, dtype=torch.float32, wide=torch.float32, odd=False, same=True, gradient=True):
        x = torch.empty((n, d + odd), dtype=dtype)[:, :d]
        settings = (x, beside(x, wide), n, kernel, list(reference.MMD_SCALES))
        calls[name] = lambda: launch(*settings, same=same, self_pairs=not same, gradient=gradient)

    add("core aligned imq, 32 lanes", "imq")
    add("core aligned rbf bfloat16, 32 lanes", "rbf", dtype=torch.bfloat16, same=False)
    add("imq value", "imq", gradient=False)
    add("rbf rows begin anywhere", "rbf", odd=True)
    add("imq odd dimensions, float16", "imq", d=37, dtype=torch.float16)
    add("imq float64", "imq", dtype=torch.float64, wide=torch.float64)
    add("rbf float64, odd dimensions, few rows", "rbf", n=10, d=5, dtype=torch.float64, wide=torch.float64)
    return calls
