"""mmd_normal: its implementations against the float64 definition, Monte Carlo, and quadrature."""

import math

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.pairs import _mmd_posteriors

from helpers import DEVICE, DTYPES, assert_as_good_as_eager, implementation, launcher, leaf, peak_bytes

both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])
posteriors = pytest.mark.parametrize("with_logvar", [False, True], ids=["points", "posteriors"])
# (N, D): why
SHAPES = [
    (32, 16),  # whole tiles
    (35, 5),  # parts of tiles, odd dimensions
    (2, 1),  # the fewest, one dimension
    (3, 12),  # several steps over the dimensions
]


def draw(n, d, with_logvar=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator) - 1]
    return [leaf(t.to(dtype)) for t in tensors[: 1 + with_logvar]]


def run(function, tensors, **settings):
    value = function(*tensors, **settings)
    return [value, *torch.autograd.grad(3 * value, tensors)]


def prior_terms(mu, logvar=None, *, scales):
    return reference.mmd_normal_terms(mu, mu * 0 if logvar is None else logvar.exp(), scales)


def check(tensors, **settings):
    exact = run(reference.mmd_normal, [leaf(t.double()) for t in tensors], **settings)
    eager, actual = run(reference.mmd_normal, tensors, **settings), run(fastkl.mmd_normal, tensors, **settings)
    # A discrepancy is a small difference of means of kernels, which are what is rounded; so is its gradient.
    scales = settings.get("scales", reference.MMD_SCALES)
    assert_as_good_as_eager(actual[0], eager[0], exact[0], scale=float(len(scales)))
    terms = run(prior_terms, [leaf(t.double()) for t in tensors], scales=scales)
    for got, naive, truth, term in zip(actual[1:], eager[1:], exact[1:], terms[1:]):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=term.abs().max())
    assert [t.dtype for t in actual] == [reference.compute_dtype(*tensors), *(t.dtype for t in tensors)]


@both
@posteriors
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, with_logvar):
    estimator = reference.MMD_ESTIMATORS[with_logvar ^ (shape[0] % 2)]
    with implementation(backend):
        check(draw(*shape, with_logvar), estimator=estimator, scales=(0.2, 2.0))


@both
@posteriors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype, with_logvar):
    with implementation(backend):
        check(draw(9, 6, with_logvar, dtype), scales=(2.0, 0.3))


def test_several_blocks(monkeypatch):
    monkeypatch.setattr(_mmd_posteriors, "SMALL", 0)
    with implementation("torch"):
        for block in (256, 16):
            monkeypatch.setattr(_mmd_posteriors, "BLOCK", block)
            for estimator in reference.MMD_ESTIMATORS:
                check(draw(50, 4), estimator=estimator)


def test_several_blocks_in_c_and_any_number_of_threads():
    tensors, found, before = draw(300, 4), [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with implementation("native"):
                check(tensors)
                found.append(run(fastkl.mmd_normal, tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_more_scales_than_the_loop_in_c_takes():
    check(draw(9, 4), scales=[0.1 * (1 + s) for s in range(20)])


@both
def test_shared_logvar_images_and_strides(backend):
    mu, logvar = torch.randn(2, 6, 4, 3, device=DEVICE)
    with implementation(backend):
        cases = [(mu, logvar), (mu, logvar[:1]), (mu, logvar[0, 0, 0]), (mu[:, :, 0], logvar[:, :, 1])]
        for m, v in cases:
            expected = reference.mmd_normal(m.double(), v.double().expand(m.shape), scales=[1.0])
            torch.testing.assert_close(fastkl.mmd_normal(m, v, scales=[1.0]).double(), expected, rtol=1e-5, atol=1e-6)


@both
def test_of_posteriors_that_are_the_prior_it_is_zero(backend):
    mu, logvar = (leaf(torch.zeros(5, 3, dtype=torch.float64)) for _ in range(2))
    with implementation(backend):
        for estimator in reference.MMD_ESTIMATORS:
            value, *gradients = run(fastkl.mmd_normal, [mu, logvar], estimator=estimator, scales=[0.5])
            torch.testing.assert_close([value, *gradients], [torch.zeros_like(t) for t in (value, mu, logvar)])


@posteriors
def test_agrees_with_quadrature(with_logvar):
    """D = 1: MMD^2 is the integral of |characteristic function of q - that of p|^2 against the kernel's density."""
    integrate = pytest.importorskip("scipy.integrate")
    tensors = [t.detach().double() for t in draw(4, 1, with_logvar)]
    mu = tensors[0][:, 0].tolist()
    variances = tensors[1].exp()[:, 0].tolist() if with_logvar else [0.0] * 4
    for s in (0.1, 1.0):

        def integrand(w, s=s):
            parts = [(math.cos(w * m) * e, math.sin(w * m) * e) for m, e in zip(mu, decay(w))]
            real, imaginary = (sum(part[i] for part in parts) / 4 for i in range(2))
            density = math.sqrt(s / (2 * math.pi)) * math.exp(-0.5 * s * w * w)
            return density * ((real - math.exp(-0.5 * w * w)) ** 2 + imaginary**2)

        def decay(w):
            return [math.exp(-0.5 * v * w * w) for v in variances]

        expected = integrate.quad(integrand, -60, 60, limit=400, epsabs=1e-12)[0]
        actual = fastkl.mmd_normal(*(t.to(DEVICE) for t in tensors), scales=[s], estimator="biased").item()
        assert actual == pytest.approx(expected, abs=1e-9)


def test_agrees_with_monte_carlo():
    """mmd with samples of the posteriors and of N(0, I): its mean over draws is the closed form, for either."""
    torch.manual_seed(0)
    mu, logvar = (t.detach().double() for t in draw(6, 3))
    exact = [fastkl.mmd_normal(mu, *v, scales=(0.5, 2.0)).item() for v in ([], [logvar])]
    found = []
    for _ in range(200):
        z, e = mu + (0.5 * logvar).exp() * torch.randn_like(mu), torch.randn(200, 3, dtype=torch.float64)
        found.append([fastkl.mmd(each, e.to(each), kernel="rbf", scales=(0.5, 2.0)) for each in (mu, z)])
    found = torch.tensor(found)
    error = (found.mean(0) - torch.tensor(exact)).abs()
    assert (error < 4 * found.std(0) / len(found) ** 0.5).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the CPU's memory")
def test_nothing_of_the_size_of_the_pairs():
    points, (mu, logvar) = draw(3000, 4, False), draw(600, 4)
    assert peak_bytes(lambda: run(fastkl.mmd_normal, points)) < 8 << 20  # 36 MB
    assert peak_bytes(lambda: run(fastkl.mmd_normal, [mu, logvar])) < 6 << 20  # 600 x 600 x 4 x 7 scales: 40 MB


@both
def test_far_posteriors_and_wide_ones_are_finite(backend):
    mu, logvar = (leaf(t.detach()) for t in draw(6, 20))
    mu.data[1], logvar.data[2], logvar.data[3] = 1e4, 60.0, -100.0
    with implementation(backend):
        check([mu, logvar], scales=(0.2, 1.0))


def test_vmap_keeps_its_dimension_out_of_the_pairs():
    mu, logvar = (torch.randn(3, 5, 4, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))
    mapped = torch.func.vmap(fastkl.mmd_normal)(mu, logvar)
    looped = torch.stack([fastkl.mmd_normal(*each) for each in zip(mu, logvar)])
    torch.testing.assert_close(mapped, looped)
    torch.testing.assert_close(*[torch.autograd.grad(v.square().sum(), (mu, logvar)) for v in (mapped, looped)])


def test_bad_arguments():
    x = torch.zeros(3, 4)
    bad = {
        "do not broadcast": lambda: fastkl.mmd_normal(x, x[:, :2]),
        "must be \\[N, D\\]": lambda: fastkl.mmd_normal(x[0]),
        "mu must have at least 2 rows": lambda: fastkl.mmd_normal(x[:1]),
        "at least one number": lambda: fastkl.mmd_normal(x, scales=()),
        "estimator must be one of": lambda: fastkl.mmd_normal(x, x, estimator="linear"),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"logvar must be a torch\.Tensor"):
        fastkl.mmd_normal(x, True)


def aot_calls():
    fwd = launcher("mmd_normal.fwd")
    calls = {}

    def add(name, n=512, d=64, dtype=torch.float32, odd=False, gradient=True):
        mu = torch.empty((n, d + odd), dtype=dtype)[:, :d]
        calls[name] = lambda: fwd(mu, mu, list(reference.MMD_SCALES), True, gradient, gradient)

    add("core aligned, 32 lanes")
    add("value", gradient=False)
    add("rows begin anywhere, bfloat16", odd=True, dtype=torch.bfloat16)
    add("odd dimensions", d=37)
    add("float64, few rows", n=10, dtype=torch.float64)
    return calls
