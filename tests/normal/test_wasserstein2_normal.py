"""wasserstein2_normal: both implementations against the float64 definition, POT and scipy; the full covariances too."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastkl
from fastkl import reference

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, empty_like, implementation, launcher, leaf

linalg = Package("scipy.linalg")
ot = Package("ot")

# (shape, event_ndim): why
SHAPES = [
    ((8, 64), 1),  # aligned rows
    ((130, 37), 1),  # odd columns, several blocks of rows in one partial sum of a shared prior
    ((2, 5000), 1),  # a long row, several programs share it
    ((2, 4, 6, 5), 3),  # images
    ((7,), 1),  # one sample, no batch dimension
    ((3, 0), 1),  # empty event: 0
]
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def draw(shape, dtype, scale="logvar", prior=None, event_ndim=1):
    generator = torch.Generator().manual_seed(0)
    small = shape[len(shape) - event_ndim :] if prior == "shared" else shape
    tensors = [torch.randn(s, generator=generator) for s in (shape, shape, *((small, small) if prior else ()))]
    tensors[1] = tensors[1].abs() + 0.1 if scale == "std" else tensors[1]
    return [leaf(tensor.to(dtype)) for tensor in tensors]


def run(function, tensors, **settings):
    value = function(*tensors, **settings)
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64, device=DEVICE).view(value.shape)
    return [value, *torch.autograd.grad(value, tensors, weights.to(value.dtype))]


def check(tensors, **settings):
    exact = run(reference.wasserstein2_normal, [leaf(t.double()) for t in tensors], **settings)
    eager = run(reference.wasserstein2_normal, tensors, **settings)
    actual = run(fastkl.wasserstein2_normal, tensors, **settings)
    for got, naive, truth in zip(actual, eager, exact):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=truth.abs().max() if truth.numel() else None)
    assert [t.dtype for t in actual] == [reference.compute_dtype(*tensors), *(t.dtype for t in tensors)]


@both
@pytest.mark.parametrize("prior", [None, "full", "shared"])
@pytest.mark.parametrize(("shape", "event_ndim"), SHAPES, ids=str)
def test_shapes(backend, shape, event_ndim, prior):
    with implementation(backend):
        check(draw(shape, torch.float32, prior=prior, event_ndim=event_ndim), event_ndim=event_ndim)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", reference.SCALES)
def test_scales_bounds_and_dtypes(backend, dtype, scale):
    with implementation(backend):
        for bounds in (None, (-1.0, 0.5), fastkl.SoftBounds(-1.0, 0.5)):
            check(draw((4, 24), dtype, scale, prior="shared"), scale=scale, bounds=bounds)
        check(draw((4, 24), dtype, scale), scale=scale)


@both
def test_digits_remain_where_the_deviations_are_close(backend):
    """exp(logvar / 2) - 1 in float32 has 2 digits left at logvar = 1e-5, none at 1e-8."""
    logvar = torch.tensor([[1e-2], [1e-5], [1e-8], [-1e-8], [0.99], [1.01]], dtype=torch.float32)
    prior = [torch.zeros(1), torch.tensor([-1.0])]
    cases = {None: (logvar, []), "prior": (logvar + prior[1], prior)}
    for parameter, p in cases.values():
        tensors = [torch.zeros_like(parameter), parameter, *p]
        exact = reference.wasserstein2_normal(*[t.double() for t in tensors])
        with implementation(backend):
            actual = fastkl.wasserstein2_normal(*[t.to(DEVICE) for t in tensors]).cpu()
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=0)


@both
def test_a_point_is_a_gaussian_too(backend):
    """A standard deviation of 0: what a deterministic encoder has; finite, with the gradient 2 (sigma - s)."""
    mu, std = leaf(torch.tensor([[1.0, 0.0]])), leaf(torch.tensor([[0.0, 0.0]]))
    logvar = leaf(torch.full((1, 2), -math.inf))
    with implementation(backend):
        for prior in ([], [torch.zeros(2, device=DEVICE)] * 2):
            distance = fastkl.wasserstein2_normal(mu, std, *prior, scale="std")
            gradients = torch.autograd.grad(distance, (mu, std))
            assert distance.item() == pytest.approx(3.0, rel=1e-6)
            torch.testing.assert_close(
                [g.cpu() for g in gradients], [torch.tensor([[2.0, 0]]), torch.full((1, 2), -2.0)]
            )
            distance = fastkl.wasserstein2_normal(mu, logvar, *prior)
            assert distance.item() == 3.0
            assert torch.autograd.grad(distance, logvar)[0].tolist() == [[0.0, 0.0]]


@both
def test_strided_inputs_are_read_where_they_lie(backend):
    head = torch.randn(6, 8, 4, 10, generator=torch.Generator().manual_seed(1))
    views = [head.chunk(2, 1), (head[:, :1].expand(6, 8, 4, 10), head), (head[0, 0].t(), head[1, 1].t())]
    with implementation(backend):
        for mu, logvar in views:
            expected = reference.wasserstein2_normal(mu.double(), logvar.double(), event_ndim=2)
            leaves = [x.to(DEVICE).detach().requires_grad_() for x in (mu, logvar)]
            actual = fastkl.wasserstein2_normal(*leaves, event_ndim=2)
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-6, atol=1e-6)
            gradients = torch.autograd.grad(actual.sum(), leaves)  # stride 0
            torch.testing.assert_close(gradients[0].cpu(), 2 * mu)
            torch.testing.assert_close(gradients[1].cpu(), (0.5 * logvar).expm1() * (0.5 * logvar).exp())


def test_saves_nothing_beyond_its_inputs_and_repeats_bit_for_bit():
    tensors, saved = draw((70, 300), torch.float32, prior="shared"), []
    with implementation("triton"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            fastkl.wasserstein2_normal(*tensors)
        first, second = (run(fastkl.wasserstein2_normal, tensors) for _ in range(2))
    assert set(saved) <= {tensor.data_ptr() for tensor in tensors}
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def gaussian(kind, *batch, size=3, seed=0, dtype=torch.float64):
    """[loc, scale]; what lies above a matrix's diagonal is not part of it, and not 0 here."""
    generator = torch.Generator().manual_seed(seed)
    loc, std = (torch.randn(*batch, size, generator=generator, dtype=torch.float64) for _ in range(2))
    matrix = torch.randn(*batch, size, size, generator=generator, dtype=torch.float64)
    std = std.abs() + 0.5
    scale = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)) + torch.diag_embed(std)
    return [leaf(t.to(dtype)) for t in (loc, scale if kind == "full" else std)]


def covariance(loc, scale):
    scale = scale.tril() if scale.dim() > loc.dim() else torch.diag_embed(scale)
    return (scale @ scale.mT).detach().cpu().numpy()


@pytest.mark.parametrize(("kind_q", "kind_p"), list(itertools.product(("diagonal", "full"), repeat=2)))
def test_full_covariances_agree_with_pot_and_scipy(kind_q, kind_p):
    tensors = [*gaussian(kind_q, 2), *gaussian(kind_p, seed=1)]
    actual = run(fastkl.wasserstein2_multivariate_normal, tensors)
    for got, expected in zip(actual, run(reference.wasserstein2_multivariate_normal, tensors)):
        torch.testing.assert_close(got, expected)
    single = [tensors[0][1], tensors[1][1], *tensors[2:]]
    loc_q, loc_p = (t.detach().cpu().numpy() for t in single[::2])
    cov_q, cov_p = covariance(*single[:2]), covariance(*single[2:])
    assert actual[0][1].item() == pytest.approx(ot.gaussian.bures_wasserstein_distance(loc_q, loc_p, cov_q, cov_p) ** 2)
    root = linalg.sqrtm(cov_p)
    traces = np.trace(cov_q + cov_p - 2 * linalg.sqrtm(root @ cov_q @ root)).real
    assert actual[0][1].item() == pytest.approx(((loc_q - loc_p) ** 2).sum() + traces)
    assert gradcheck(fastkl.wasserstein2_multivariate_normal, tensors)
    assert gradgradcheck(fastkl.wasserstein2_multivariate_normal, tensors)


def test_diagonal_and_full_covariances_agree():
    mu, std, prior_mu, prior_std = (torch.rand(4, 3, dtype=torch.float64, device=DEVICE) + 0.1 for _ in range(4))
    expected = fastkl.wasserstein2_normal(mu, std, prior_mu, 2 * prior_std.log(), scale="std")
    for q, p in itertools.product((std, torch.diag_embed(std)), (prior_std, torch.diag_embed(prior_std))):
        torch.testing.assert_close(fastkl.wasserstein2_multivariate_normal(mu, q, prior_mu, p), expected)


def test_repeated_eigenvalues_have_finite_gradients():
    """Autograd of an eigendecomposition divides by 0 here. At the minimum gradient and distance must be 0, in float32
    too; the second derivative must be finite if it exists."""
    loc, matrix = torch.zeros(1, 3, device=DEVICE), gaussian("full", 1, dtype=torch.float32)[1].detach().tril()
    for scale in (torch.eye(3, device=DEVICE)[None], matrix):
        scale = leaf(scale)
        value = fastkl.wasserstein2_multivariate_normal(loc, scale, loc, scale.detach().clone())
        (gradient,) = torch.autograd.grad(value.sum(), scale)
        assert value.item() < 1e-11
        assert gradient.abs().max() < 1e-5
    identity, other = (leaf(s * torch.eye(3, dtype=torch.float64)[None]) for s in (1, 2))
    loc = loc.double()
    assert gradgradcheck(lambda s: fastkl.wasserstein2_multivariate_normal(loc, s, loc, other.detach()), identity)
    assert gradgradcheck(lambda s: fastkl.wasserstein2_multivariate_normal(loc, s, loc, torch.eye(3)[None]), identity)
    singular = leaf(torch.zeros(1, 3, 3))  # a point
    value = fastkl.wasserstein2_multivariate_normal(loc, singular, loc, other.detach())
    assert value.item() == pytest.approx(12)
    assert torch.autograd.grad(value.sum(), singular)[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([(3,), (4,)], r"do not broadcast: mu \(3,\), logvar \(4,\)"),
        ([(2, 3), (2, 3), (5,)], "do not broadcast"),
        ([(), ()], "event_ndim=1 needs at least 1 dimension"),
    ],
)
def test_errors_name_the_argument(arguments, match):
    with pytest.raises(ValueError, match=match):
        fastkl.wasserstein2_normal(*(torch.ones(shape) for shape in arguments))
    with pytest.raises(TypeError, match=r"logvar must be a torch\.Tensor"):
        fastkl.wasserstein2_normal(torch.ones(3), [1.0])
    with pytest.raises(ValueError, match="scale_tril must be"):
        fastkl.wasserstein2_multivariate_normal(torch.ones(3), torch.ones(2), torch.ones(3), torch.ones(3))


def aot_calls():
    fwd, bwd = launcher("wasserstein2_normal.fwd"), launcher("wasserstein2_normal.bwd")
    calls = {}

    def add(name, shape, dtype=torch.float32, prior=None, scale="logvar", bounds=(-math.inf, math.inf, False)):
        mu = torch.empty(shape, dtype=dtype)
        p = torch.empty(shape[-1:] if prior == "shared" else shape, dtype=dtype) if prior else None
        inputs, settings = (mu, mu, p, p), (1, scale, *bounds)
        ddistance = torch.empty(shape[:1], dtype=reference.compute_dtype(mu))
        calls[f"{name} fwd"] = lambda: fwd(*inputs, *settings)
        calls[f"{name} bwd"] = lambda: bwd(ddistance, *inputs, *empty_like(*inputs), *settings)

    add("core aligned float32", (4096, 512))
    add("core aligned bfloat16 shared prior", (4096, 512), dtype=torch.bfloat16, prior="shared")
    add("float64 prior std", (4096, 64), dtype=torch.float64, prior="full", scale="std")
    add("odd shared prior softplus", (370, 37), prior="shared", scale="softplus", bounds=(-30.0, 20.0, False))
    return calls
