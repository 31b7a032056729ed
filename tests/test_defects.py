"""Known defects of other libraries and of the common one-line formula, which fastkl must not have."""

import math

import pytest
import torch

import fastkl

from helpers import DEVICE, implementation

both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def one_liner(mu, logvar):
    return 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(1)


@both
def test_bfloat16_kl_of_a_nearly_standard_posterior_is_not_negative(backend):
    """diffusers: the KL of a bf16 tensor with logvar = 0.01 over 16 x 64 x 64 is 1.64, not -72."""
    logvar = torch.full((1, 16, 64, 64), 0.01, dtype=torch.bfloat16, device=DEVICE)
    mu = torch.zeros_like(logvar)
    with implementation(backend):
        kl = fastkl.kl_normal(mu, logvar, event_ndim=3)
    x = logvar[0, 0, 0, 0].item()  # the bf16 nearest to 0.01
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(65536 * 0.5 * (math.expm1(x) - x), rel=1e-4)
    assert kl.item() == pytest.approx(1.64, abs=0.01)
    assert one_liner(mu.flatten(1), logvar.flatten(1)).item() < 0  # the defect is real


@both
@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6), (2, 4, 5, 6), (2, 3, 4, 5, 6)], ids=str)
def test_latents_of_any_rank_give_one_kl_per_datum(backend, shape):
    """diffusers sums fixed dimensions [1, 2, 3]: 2-D and 3-D latents fail, video latents keep a dimension."""
    mu, logvar = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = one_liner(mu.double().flatten(1), logvar.double().flatten(1))
    with implementation(backend):
        for q in (fastkl.DiagonalNormal(mu, logvar), fastkl.DiagonalNormal.from_packed(torch.cat([mu, logvar], 1))):
            assert q.kl().shape == (2,)
            torch.testing.assert_close(q.kl().double(), exact, rtol=1e-5, atol=1e-5)


@both
def test_small_kl_does_not_cancel(backend):
    """The naive float32 formula gives 8.3e-9 per dimension at logvar = 1e-4, where the KL is 2.50e-9."""
    logvar = torch.full((1, 1000), 1e-4, device=DEVICE)
    mu = torch.zeros_like(logvar)
    with implementation(backend):
        kl = fastkl.kl_normal(mu, logvar).item() / 1000
    assert kl == pytest.approx(2.50e-9, rel=4e-3)
    assert one_liner(mu, logvar).item() / 1000 > 8e-9  # the defect is real


@both
def test_tiny_standard_deviation_has_a_finite_kl(backend):
    """sigma^2 underflows in float32 below 1e-23; ln sigma^2 does not."""
    std = torch.full((1, 1), 1e-25, device=DEVICE, requires_grad=True)
    with implementation(backend):
        kl = fastkl.kl_normal(torch.zeros_like(std), std, scale="std")
        kl.sum().backward()
    assert kl.item() == pytest.approx(57.06, abs=5e-3)
    assert std.grad.item() == pytest.approx(-1e25, rel=1e-5)
    assert std.detach().square().item() == 0.0  # where others take the logarithm of 0


@both
def test_a_dead_gradient_outside_the_clamp_is_a_choice(backend):
    """With a plain clamp, a log-variance outside its bounds stays there forever; with SoftBounds it is pulled back."""
    for value, direction in ((50.0, 1), (-50.0, -1)):
        gradients = {}
        for bounds in ((-30.0, 20.0), fastkl.SoftBounds(-30.0, 20.0)):
            logvar = torch.full((1, 4), value, device=DEVICE, requires_grad=True)
            with implementation(backend):
                kl = fastkl.kl_normal(torch.zeros_like(logvar), logvar, bounds=bounds)
                kl.sum().backward()
                z, _ = fastkl.rsample_kl(torch.zeros_like(logvar), logvar, bounds=bounds, eps=torch.ones_like(logvar))
                (dz,) = torch.autograd.grad(z.sum(), logvar)
            clamped = math.copysign(20.0 if value > 0 else 30.0, value)
            assert kl.item() == pytest.approx(2 * (math.expm1(clamped) - clamped), rel=1e-5)
            gradients[type(bounds)] = logvar.grad, dz
        assert all((g == 0).all() for g in gradients[tuple])
        assert (gradients[fastkl.SoftBounds][0] * direction > 0.4).all()
        assert (gradients[fastkl.SoftBounds][1] > 0).all()
