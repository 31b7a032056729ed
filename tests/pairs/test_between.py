"""Sums of kernels over the pairs of two batches, of which a ring of processes makes an MMD: value and gradient."""

import pytest
import torch

from fastkl import reference
from fastkl.ops.pairs import _mmd, _mmd_posteriors

from helpers import DEVICE, implementation

SCALES = [0.1, 1.0, 3.0]
SIZES = [(5, 3), (1, 2), (70, 600)]


@pytest.mark.parametrize("kernel", reference.MMD_KERNELS)
@pytest.mark.parametrize(
    ("backend", "rows", "others"),
    [(backend, *sizes) for backend in ("torch", "native", "triton") for sizes in SIZES[: 2 + (backend != "triton")]],
)
def test_points_against_points(backend, rows, others, kernel):
    torch.manual_seed(0)
    x, y = (torch.randn(count, 7, dtype=torch.float64, device=DEVICE) for count in (rows, others))
    x.requires_grad_()
    expected = reference.mmd_kernel(0.5 * (x.unsqueeze(1) - y).square().mean(-1), kernel, SCALES).sum()
    with implementation(backend):
        value, gradient = _mmd.between(x.detach(), y, kernel, SCALES, True)
        (alone,) = _mmd.between(x.detach(), y, kernel, SCALES, False)
    torch.testing.assert_close([value, alone], [expected.detach()] * 2)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, x))


@pytest.mark.parametrize(
    ("backend", "rows", "others"),
    [(backend, *sizes) for backend in ("torch", "triton") for sizes in SIZES[: 2 + (backend != "triton")]],
)
def test_posteriors_against_posteriors(backend, rows, others):
    torch.manual_seed(0)
    shapes = [(rows, 7), (rows, 7), (others, 7), (others, 7)]
    given = mu, logvar, other_mu, other_logvar = [torch.randn(s, dtype=torch.float64, device=DEVICE) for s in shapes]
    mu.requires_grad_(), logvar.requires_grad_()
    variance = logvar.exp().unsqueeze(1) + other_logvar.exp()
    expected = reference.rbf_of_normals(mu.unsqueeze(1) - other_mu, variance, SCALES).sum()
    with implementation(backend):
        value, *gradients = _mmd_posteriors.between(*(each.detach() for each in given), SCALES, True)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, [mu, logvar])))
