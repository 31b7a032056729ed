"""The accuracy of gmm_log_prob in float32 and 16 bits, and its memory."""

import numpy as np
import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.mixture import _at_once, _sweep
from fastkl.ops.mixture._mixture import Mixture

from gmm_helpers import BACKENDS, MIB, draw, gradients, ordinary
from helpers import DEVICE, assert_as_good_as_eager, implementation, leaf, peak_bytes

# name -> (z, logits, means, logvars) in float64; all are rounded to the dtype before the reference sees them
EXTREMES = {
    "ordinary": ordinary,
    "narrow, means at 10": lambda: narrow(10.0, 0.1),
    "narrow, means at 100": lambda: narrow(100.0, 0.1),
    "very narrow, means at 10": lambda: narrow(10.0, 1e-3),
    "so narrow that even float64 cannot expand": lambda: narrow(10.0, 1e-5),
    "a shift of 1000": lambda: tuple(tensor + shift for tensor, shift in zip(ordinary(), (1000, 0, 1000, 0))),
}


def narrow(distance, sigma):
    means = distance * draw(20, 16, seed=2).sign() + draw(20, 16, seed=5)
    near = means[torch.arange(40, device=DEVICE) % 20] + sigma * draw(40, 16)
    return near, draw(20, seed=1), means, torch.full((20, 1), 2 * np.log(sigma), dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("way", "small"), [("torch", True), ("torch", False), ("native", True), ("triton", True)])
def test_as_exact_as_differences(monkeypatch, name, dtype, way, small):
    """The contract of every op holds for the expansion, too: no worse than broadcasting in the same dtype."""
    monkeypatch.setattr(_at_once, "SMALL", _at_once.SMALL if small else 0)
    inputs = [tensor.to(dtype) for tensor in EXTREMES[name]()]
    expected, dexpected = gradients(reference.gmm_log_prob, *(tensor.double() for tensor in inputs))
    eager, deager = gradients(reference.gmm_log_prob, *inputs)
    with implementation(way):
        actual, dactual = gradients(fastkl.gmm_log_prob, *inputs)
    assert actual.dtype == torch.float32
    assert_as_good_as_eager(actual, eager, expected)
    for gradient, own, truth in zip(dactual, deager, dexpected):
        assert gradient.dtype == dtype
        # Sums over the batch of terms that cancel: rounding is relative to the largest.
        assert_as_good_as_eager(
            gradient, own, truth, scale=truth.abs().max(), units=64 if dtype == torch.float32 else 4
        )


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("way", ["torch", "native", "triton"])
def test_bounds_are_as_exact_as_differences(name, way):
    z, logits, means, logvars = (tensor.float() for tensor in EXTREMES[name]())
    inputs = [z, logvars.mean().expand(z.shape), logits, means, logvars]
    expected = reference.kl_gmm_bounds(*(tensor.double() for tensor in inputs))
    with implementation(way):
        actual = fastkl.kl_gmm_bounds(*inputs)
    largest = z.shape[1] * logvars.abs().max().double()  # of the terms that cancel: the logarithms of the variances
    for bound, own, truth in zip(actual, reference.kl_gmm_bounds(*inputs), expected):
        assert_as_good_as_eager(bound, own, truth, scale=largest.clamp(min=1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_and_distant_within_a_ten_thousandth_nat(backend):
    inputs = [tensor.float() for tensor in narrow(10.0, 0.1)]
    expected = reference.gmm_log_prob(*(tensor.double() for tensor in inputs))
    with implementation(backend):
        actual = fastkl.gmm_log_prob(*inputs)
    assert (actual.double() - expected).abs().max() < 1e-4


@pytest.mark.skipif(DEVICE != "cpu", reason="the closed form's expansion")
def test_the_float32_expansion_is_worse_by_far(monkeypatch):
    """Known defect of |z|^2 - 2 z m + |m|^2 in float32, which precision="tf32x3" and "tf32" allow."""
    monkeypatch.setattr(_at_once, "SMALL", 0)  # tensors that are made at once have no expansion
    inputs = [tensor.float() for tensor in narrow(10.0, 0.1)]
    expected = reference.gmm_log_prob(*(tensor.double() for tensor in inputs))
    with implementation("torch"):
        error = {
            precision: (fastkl.gmm_log_prob(*inputs, precision=precision).double() - expected).abs().max().item()
            for precision in ("exact", "tf32x3", "tf32")
        }
    assert error["exact"] < 1e-4
    assert 1e-3 < error["tf32x3"] < 1
    assert error["tf32"] >= error["tf32x3"] / 2


@pytest.mark.parametrize("size", [(200000, 2, 1), (20000, 4, 2)], ids=str)
def test_sums_over_many_rows(size):
    """Narrow products add rows up one by one: in float32 that loses three digits of the parameters' gradients."""
    n, k, d = size
    inputs = [draw(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate([(n, d), (k,), (k, d), (k, d)])]
    results = []
    for function, dtype in ((reference.gmm_log_prob, torch.float64), (fastkl.gmm_log_prob, torch.float32)):
        leaves = [leaf(tensor.to(dtype)) for tensor in inputs]
        results.append(torch.autograd.grad(function(*leaves).mean(), leaves))
    for truth, gradient in zip(*results):
        assert (gradient.double() - truth).abs().max() < 1e-5 * truth.abs().max()


def test_weights_for_each_of_many_rows():
    """Their softmax is taken in blocks of a million."""
    shapes = [(1300, 1), (1300, 1000), (1000, 1)]
    inputs = [draw(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate(shapes)]
    actual = gradients(fastkl.gmm_log_prob, *inputs)[1][1]
    expected = gradients(reference.gmm_log_prob, *(tensor.double() for tensor in inputs))[1][1]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-8)


# (N, K, D), whether weights are kept for backward; the last two are cut into several slices of components
SIZES = {
    (4096, 500, 40): True,
    (2048, 1000, 256): True,
    (20000, 700, 4): False,
    (600, 20000, 40): False,
    (8, 30, 50000): True,
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the closed form's memory")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_memory_is_bounded_whatever_the_sizes(size):
    """Forward and backward allocate at most 32 MiB beyond inputs, gradients and a few values for each row."""
    n, k, d = size
    inputs = [
        leaf(draw(*shape, seed=seed, dtype=torch.float32)) for seed, shape in enumerate([(n, d), (k,), (k, d), (k, d)])
    ]
    results = sum(tensor.nbytes for tensor in inputs)
    used = peak_bytes(lambda: torch.autograd.grad(fastkl.gmm_log_prob(*inputs).sum(), inputs))
    assert used < results + 32 * MIB + 64 * n
    assert _sweep.keep_for(inputs[:1], Mixture(*(t[None] for t in inputs[1:]), None)) == 1 + SIZES[size]
    used = peak_bytes(
        lambda: fastkl.kl_gmm(*(inputs[0].detach(),) * 2, *(t.detach() for t in inputs[1:]), num_samples=3)
    )
    assert used < 32 * MIB + 64 * n


@pytest.mark.parametrize("op", [fastkl.gmm_log_prob, fastkl.gmm_responsibilities])
@pytest.mark.parametrize("samples", [0, 1, 3])  # of each datum, with a mixture of its own; 0: one mixture for all
@pytest.mark.parametrize("limit", ["COMPONENTS_BYTES", "KEPT_BYTES"])
def test_slices_and_blocks_change_nothing(monkeypatch, op, samples, limit):
    inputs = [tensor.float() for tensor in ordinary()]
    if samples:
        shapes = [(samples, 40, 4), (40, 6), (40, 6, 4), (40, 6, 4)]
        inputs = [draw(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate(shapes)]
    expected = gradients(op, *inputs)
    monkeypatch.setattr(_at_once, "SMALL", 0)
    torch.testing.assert_close(gradients(op, *inputs), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(_sweep, limit, 1000 if samples else 4000)
    monkeypatch.setattr("fastkl.ops.mixture._expansion.PRODUCT_BYTES", 8000)
    monkeypatch.setattr("fastkl.ops.mixture._differences.DIFFERENCES_BYTES", 8000)
    torch.testing.assert_close(gradients(op, *inputs), expected, rtol=1e-4, atol=1e-4)
