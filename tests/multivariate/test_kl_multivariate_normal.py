"""kl_multivariate_normal against the float64 definition, torch.distributions and scipy."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import MultivariateNormal, kl_divergence

import fastkl
from fastkl import reference

from helpers import DEVICE, DTYPES, Package, leaf

stats = Package("scipy.stats")

KINDS = ("diagonal", "full")
kinds = pytest.mark.parametrize(("kind_q", "kind_p"), list(itertools.product(KINDS, KINDS)))


def gaussian(kind, *batch, size=3, seed=0, dtype=torch.float64):
    """[loc, scale]; what lies above a matrix's diagonal is not part of it, and not 0 here."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(*batch, size, generator=generator, dtype=torch.float64)
    std = torch.rand(*batch, size, generator=generator, dtype=torch.float64) + 0.5
    matrix = torch.randn(*batch, size, size, generator=generator, dtype=torch.float64)
    scale = matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)) + torch.diag_embed(std)
    return [leaf(t.to(dtype)) for t in (loc, scale if kind == "full" else std)]


def distribution(loc, scale):
    return MultivariateNormal(loc, scale_tril=scale.tril() if scale.dim() > loc.dim() else torch.diag_embed(scale))


@kinds
@pytest.mark.parametrize(
    ("batch_q", "batch_p"),
    [((), ()), ((4,), (4,)), ((4,), ()), ((), (4,)), ((2, 1), (4,)), ((3,), (1,)), ((3,), (3,))],
    ids=str,
)
def test_values_and_gradients_against_torch_distributions(kind_q, kind_p, batch_q, batch_p):
    tensors = [*gaussian(kind_q, *batch_q), *gaussian(kind_p, *batch_p, seed=1)]
    q, p = distribution(*tensors[:2]), distribution(*tensors[2:])
    actual, expected = fastkl.kl_multivariate_normal(*tensors), kl_divergence(q, p)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(reference.kl_multivariate_normal(*tensors), expected)
    weights = torch.arange(1, actual.numel() + 1, dtype=torch.float64, device=DEVICE).view(actual.shape)
    gradients = [torch.autograd.grad(value, tensors, weights) for value in (actual, expected)]
    torch.testing.assert_close(*gradients)


@kinds
def test_agrees_with_scipy(kind_q, kind_p):
    """E_q[ln q - ln p] of a quadratic is exact by Gauss-Hermite quadrature with three nodes a dimension."""
    tensors = [*gaussian(kind_q), *gaussian(kind_p, seed=1)]
    q, p = (distribution(*pair) for pair in (tensors[:2], tensors[2:]))
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    standard = np.array(list(itertools.product(nodes, repeat=3)))
    weights = np.prod(list(itertools.product(weights / weights.sum(), repeat=3)), axis=1)
    points = standard @ q.scale_tril.detach().cpu().numpy().T + q.loc.detach().cpu().numpy()
    parameters = [(d.loc.detach().cpu().numpy(), d.covariance_matrix.detach().cpu().numpy()) for d in (q, p)]
    log_q, log_p = (stats.multivariate_normal(*pair).logpdf(points) for pair in parameters)
    expected = (weights * (log_q - log_p)).sum()
    assert fastkl.kl_multivariate_normal(*tensors).item() == pytest.approx(expected, rel=1e-10)


def test_diagonal_or_matrix_is_decided_by_the_number_of_dimensions():
    loc, std = torch.zeros(3, 3, device=DEVICE), torch.rand(3, 3, device=DEVICE) + 0.5
    standard = (torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE))
    as_diagonals = fastkl.kl_normal(loc, std, scale="std")
    torch.testing.assert_close(fastkl.kl_multivariate_normal(loc, std, *standard), as_diagonals)
    shared = fastkl.kl_multivariate_normal(loc, std[None], *standard)
    torch.testing.assert_close(shared, fastkl.kl_multivariate_normal(loc[0], std, *standard).expand(3))
    torch.testing.assert_close(fastkl.kl_multivariate_normal(loc, std[0], *standard), as_diagonals[:1].expand(3))


@kinds
def test_close_gaussians_do_not_cancel(kind_q, kind_p):
    """In float32 the usual formula gives noise of 1e-7 where the divergence is 1e-8 and less."""
    loc, scale = torch.zeros(8), torch.full((8,), 1.0 + 1e-5)
    scales = [torch.diag(s) if kind == "full" else s for s, kind in ((scale, kind_q), (torch.ones(8), kind_p))]
    exact = reference.kl_normal(loc.double(), scale.double(), scale="std").item()
    actual = fastkl.kl_multivariate_normal(loc, scales[0], loc, scales[1]).item()
    assert actual == pytest.approx(exact, rel=0.01)
    if kind_q == kind_p:
        assert fastkl.kl_multivariate_normal(loc, scales[1], loc, scales[1]) == 0


@kinds
def test_dtypes(kind_q, kind_p):
    for dtype in DTYPES:
        tensors = [*gaussian(kind_q, 5, dtype=dtype), *gaussian(kind_p, 5, seed=1, dtype=dtype)]
        actual = fastkl.kl_multivariate_normal(*tensors)
        assert actual.dtype == reference.compute_dtype(*tensors)
        expected = reference.kl_multivariate_normal(*[tensor.double() for tensor in tensors])
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        assert [g.dtype for g in torch.autograd.grad(actual.sum(), tensors)] == [dtype] * 4


def test_empty_batch():
    tensors = [*gaussian("diagonal", 0), *gaussian("full")]
    value = fastkl.kl_multivariate_normal(*tensors)
    assert value.shape == (0,)
    assert [g.shape for g in torch.autograd.grad(value.sum(), tensors)] == [t.shape for t in tensors]


@pytest.mark.parametrize(("kind_q", "kind_p"), [("diagonal", "full"), ("full", "full")])
def test_right_under_compile_where_torch_distributions_fails(kind_q, kind_p):
    for dynamic, sizes in ((False, (4,)), (True, (4, 5))):  # a second size would only be compiled anew
        torch._dynamo.reset()
        compiled = torch.compile(fastkl.kl_multivariate_normal, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for rows in sizes:
            tensors = [*gaussian(kind_q, rows), *gaussian(kind_p, seed=1)]
            expected = kl_divergence(distribution(*tensors[:2]), distribution(*tensors[2:]))
            actual = compiled(*tensors)
            torch.testing.assert_close(actual, expected)
            gradients = [torch.autograd.grad(value.sum(), tensors) for value in (actual, expected)]
            torch.testing.assert_close(*gradients)


@kinds
def test_higher_derivatives_and_vmap(kind_q, kind_p):
    tensors = [*gaussian(kind_q, 2), *gaussian(kind_p, seed=1)]
    assert gradcheck(fastkl.kl_multivariate_normal, tensors)
    assert gradgradcheck(fastkl.kl_multivariate_normal, tensors)
    mapped = torch.func.vmap(fastkl.kl_multivariate_normal, (0, 0, None, None))(*tensors)
    torch.testing.assert_close(mapped, fastkl.kl_multivariate_normal(*tensors))


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        (((3,), (3,), (4,), (4,)), r"mu and prior_mu .*same D.*\(3,\) and \(4,\)"),
        (((), (3,), (3,), (3,)), "mu and prior_mu must be"),
        (((0,), (0,), (0,), (0,)), "D > 0"),
        (((3,), (3, 4), (3,), (3,)), r"scale_tril must be lower triangles \(\*batch, 3, 3\).*got \(3, 4\)"),
        (((3,), (5, 3), (3,), (3,)), "scale_tril must be"),
        (((3,), (3,), (3,), (2,)), r"prior_scale_tril must be .*diagonals \(\*batch, 3\)"),
        (((3,), (3,), (3,), ()), "prior_scale_tril must be"),
        (((5, 3), (5, 3), (5, 3), (3, 3)), r"prior_scale_tril\[None\]"),
        (((5, 3), (5, 3), (4, 3), (3,)), r"do not broadcast: mu \(5,\), prior_mu \(4,\)"),
    ],
)
def test_errors_name_the_argument(shapes, match):
    with pytest.raises(ValueError, match=match):
        fastkl.kl_multivariate_normal(*(torch.ones(shape) for shape in shapes))


def test_integers_are_refused():
    loc, scale = torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match="prior_scale_tril must be a floating-point tensor"):
        fastkl.kl_multivariate_normal(loc, scale, loc, scale.long())


@kinds
@pytest.mark.parametrize("function", [fastkl.kl_multivariate_normal, reference.kl_multivariate_normal])
def test_standard_deviations_that_no_quotient_holds(kind_q, kind_p, function):
    """1e-30 against 1e30: the squares, the quotient and its square are 0 in float32, and the divergence is 275.3."""
    loc, narrow, wide = torch.zeros(2), torch.full((2,), 1e-30), torch.full((2,), 1e30)
    scales = [torch.diag(s) if kind == "full" else s for s, kind in ((narrow, kind_q), (wide, kind_p))]
    scales = [leaf(scale) for scale in scales]
    value = function(loc.to(DEVICE), scales[0], loc.to(DEVICE), scales[1])
    x = 4 * np.log(1e-30)
    assert value.item() == pytest.approx(np.expm1(x) - x, rel=1e-6)
    value.backward()
    gradients = [scale.grad.diagonal() if scale.dim() > 1 else scale.grad for scale in scales]
    for gradient, expected in zip(gradients, (-1e30, 1e-30)):
        assert gradient.tolist() == pytest.approx([expected] * 2, rel=1e-5)
    equal = function(loc.to(DEVICE), scales[0].detach(), loc.to(DEVICE), scales[0].detach())
    assert equal == 0


@pytest.mark.parametrize("function", [fastkl.kl_multivariate_normal, reference.kl_multivariate_normal])
@pytest.mark.parametrize("kind_q", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_narrow_triangle_and_a_wide_one(function, kind_q, size):
    """L_p = size [[1, 0], [1, 1]] and L_q = size I: L_p^-1 L_q = [[1, 0], [-1, 1]], whatever the size."""
    scale_p = leaf(size * torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    scale_q = leaf(size * (torch.eye(2) if kind_q == "full" else torch.ones(2)))
    loc = torch.zeros(2, device=DEVICE)
    value = function(loc, scale_q, loc, scale_p)
    assert value.item() == pytest.approx(0.5, rel=1e-6)
    value.backward()
    diagonal = scale_q.grad.diagonal() if kind_q == "full" else scale_q.grad
    assert (diagonal * size).tolist() == pytest.approx([1.0, 0.0], rel=1e-5, abs=1e-6)
