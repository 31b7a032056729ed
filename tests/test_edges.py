"""Edge cases where a direct evaluation of the formula fails: both implementations, values and gradients."""

import math

import pytest
import torch

import fastkl
from fastkl import reference

from helpers import DEVICE, implementation, leaf

both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def grad(value, *inputs):
    return torch.autograd.grad(value.sum(), inputs)


@both
def test_a_difference_of_zero_is_zero_under_a_tiny_prior_variance(backend):
    """1 / prior_var overflows float32 at prior_logvar = -100, and 0 times infinity is no KL."""
    tensors = [leaf(torch.full((1, 2), value)) for value in (0.5, -100.0, 0.5, -100.0)]
    with implementation(backend):
        kl = fastkl.kl_normal(*tensors)
        gradients = grad(kl, *tensors)
        _, same = fastkl.rsample_kl(*tensors)
    assert kl.item() == same.item() == 0.0
    assert all((g == 0).all() for g in gradients)


@both
@pytest.mark.parametrize("scale", ["logvar", "log_std"])
def test_bounds_take_in_an_infinite_log_variance(backend, scale):
    """The purpose of clamps: float16 overflows to infinity. The value is the bound's, the gradient not NaN."""
    mu, parameter = leaf(torch.zeros(2, 2)), leaf(torch.tensor([[math.inf, 1.0], [-math.inf, 1.0]]))
    with implementation(backend):
        kl = fastkl.kl_normal(mu, parameter, scale=scale, bounds=(-30, 20))
        _, gradient = grad(kl, mu, parameter)
    one = reference.kl_normal(torch.zeros(1), torch.ones(1), scale=scale).item()
    expected = [0.5 * (math.expm1(20) - 20) + one, 0.5 * (math.expm1(-30) + 30) + one]
    torch.testing.assert_close(kl.cpu(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert gradient[:, 0].tolist() == [0.0, 0.0]
    assert gradient[:, 1].isfinite().all()


@both
def test_bounds_take_in_a_standard_deviation_of_zero(backend):
    mu, std = leaf(torch.zeros(1, 2)), leaf(torch.tensor([[0.0, 1.0]]))
    with implementation(backend):
        for kl in (
            fastkl.kl_normal(mu, std, scale="std", bounds=(-30, 20)),
            fastkl.rsample_kl(mu, std, scale="std", bounds=(-30, 20), seed=1)[1],
        ):
            assert grad(kl, std)[0].tolist() == [[0.0, 0.0]]


@both
def test_zero_weight_with_zero_std_has_no_gradient(backend):
    mu, std, weight = leaf(torch.zeros(2, 1)), leaf(torch.zeros(2, 1)), torch.tensor([0.0, 1.0], device=DEVICE)
    with implementation(backend):
        per_dim = fastkl.kl_normal_per_dim(mu.T, std.T, scale="std")
        for kl in (fastkl.kl_normal(mu, std, scale="std"), fastkl.rsample_kl(mu, std, scale="std", seed=1)[1], per_dim):
            assert grad(weight * kl, std)[0].tolist() == [[0.0], [-math.inf]]


@both
@pytest.mark.parametrize("prior", [False, True])
def test_a_sample_whose_kl_is_not_used_and_overflows(backend, prior):
    tensors = [leaf(torch.full((2, 3), value)) for value in (0.0, 100.0, 0.0, 0.0)[: 4 if prior else 2]]
    with implementation(backend):
        z, _ = fastkl.rsample_kl(*tensors, eps=torch.ones(2, 3, device=DEVICE))
        dmu, dlogvar, *dprior = torch.autograd.grad(z.sum(), tensors, allow_unused=True)
    assert (dmu == 1).all()
    torch.testing.assert_close(dlogvar, torch.full_like(dlogvar, 0.5 * math.exp(50)), rtol=1e-5, atol=0)
    assert all(d is None or (d == 0).all() for d in dprior)


@both
def test_broadcast_half_gradients_are_summed_in_float32(backend):
    """64 gradients of 1.6e-8, each below float16's smallest number; their sum is not."""
    mu, logvar = leaf(torch.zeros(64, 8, dtype=torch.float16)), leaf(torch.full((8,), 0.3, dtype=torch.float16))
    with implementation(backend):
        (gradient,) = grad(1e-6 * fastkl.kl_normal(mu, logvar), logvar)
    assert gradient.dtype == torch.float16
    assert gradient[0].item() == pytest.approx(64e-6 * 0.5 * math.expm1(0.3), rel=0.05)


@both
def test_non_finite_parameters_stay_in_their_row(backend):
    mu, logvar = torch.zeros(6, 5), torch.zeros(6, 5)
    mu[1, 2], logvar[3, 4], logvar[5, 0] = math.nan, math.inf, math.nan
    mu, logvar = leaf(mu), leaf(logvar)
    with implementation(backend):
        z, kl = fastkl.rsample_kl(mu, logvar, seed=2)
        gradients = grad(z.sum(1) + kl, mu, logvar)
        again = fastkl.rsample_normal(mu, logvar, seed=2)
    for tensor in (z, again, kl[:, None], gradients[0] + gradients[1]):
        assert tensor[::2].isfinite().all()
        assert not tensor[1::2].isfinite().all(1).any()


@both
def test_views_that_two_dimensions_an_axis_do_not_describe(backend):
    """Three batch or event dimensions that do not merge: copied, and right."""
    base = torch.randn(4, 6, 6, 10, generator=torch.Generator().manual_seed(0))
    for view, event_ndim in ((base[:, ::2, ::2, ::2], 3), (base[::2, ::2, ::2], 1)):
        tensors = [leaf(base).as_strided(view.shape, view.stride()) for _ in range(2)]
        weights = torch.randn(view.shape[: 4 - event_ndim]).transpose(0, -1).contiguous().transpose(0, -1).to(DEVICE)
        with implementation(backend):
            z, kl = fastkl.rsample_kl(*tensors, event_ndim=event_ndim, seed=5)
            actual = [z, kl, *grad(weights * kl + z.flatten(4 - event_ndim).sum(-1), *tensors)]
            close = fastkl.kl_normal(*tensors, event_ndim=event_ndim)
        z, kl = reference.rsample_kl(*tensors, event_ndim=event_ndim, seed=torch.tensor(5, device=DEVICE))
        expected = [z, kl, *grad(weights * kl + z.flatten(4 - event_ndim).sum(-1), *tensors)]
        for a, b in zip([*actual, close], [*expected, kl]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_vmap_over_seeds_gives_each_its_own_noise():
    mu, logvar, seeds = torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([1, 2, 3])
    for num_samples in (None, 2):

        def draw(m, v, s, num_samples=num_samples):
            return fastkl.rsample_normal(m, v, seed=s, num_samples=num_samples)

        expected = torch.stack([draw(mu[i], logvar[i], seeds[i]) for i in range(3)])
        # The native noise is that of torch's operations to rounding.
        torch.testing.assert_close(torch.func.vmap(draw)(mu, logvar, seeds), expected, rtol=1e-5, atol=1e-5)
        together = torch.func.vmap(draw, in_dims=(0, 0, None))(mu, logvar, seeds[0])
        assert torch.equal(together[0], together[1])


# Shapes of mu, logvar, prior_mu, prior_logvar (None: absent), all to broadcast.
BROADCAST = [
    ((5, 2, 4), (5, 2, 4), (), ()),
    ((5, 2, 4), (5, 2, 4), (5, 1, 1), (5, 1, 1)),
    ((5, 2, 4), (5, 2, 4), (2, 1), (2, 1)),
    ((5, 2, 4), (5, 2, 4), (2, 4), None),
    ((5, 2, 4), (5, 2, 4), None, (1, 1, 4)),
    ((5, 1, 4), (1, 2, 4), (4,), (1, 4)),
    ((4,), (4,), (1, 4), (4,)),
    ((2, 4), (2, 4), (5, 2, 4), (4,)),
    ((5, 2, 4), (), (2, 1), (2, 4)),
]


@both
@pytest.mark.parametrize("shapes", BROADCAST, ids=str)
def test_everything_broadcasts(backend, shapes):
    generator = torch.Generator().manual_seed(6)
    tensors = [None if s is None else leaf(torch.randn(s, generator=generator)) for s in shapes]
    given = [t for t in tensors if t is not None]
    wide = [None if t is None else leaf(t.double()) for t in tensors]
    with implementation(backend):
        actual = fastkl.kl_normal(*tensors)
        gradients = grad(actual, *given)
    zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
    expected = reference.kl_normal(*wide[:2], *(zero if t is None else t for t in wide[2:]))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, grad(expected, *(t for t in wide if t is not None))):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_nothing_is_saved_beyond_the_inputs():
    a, b, c = (leaf(torch.randn(64, 32)) for _ in range(3))
    calls = {
        "kl_normal": lambda: fastkl.kl_normal(a, b, c[0], c[1]),
        "kl_normal_per_dim": lambda: fastkl.kl_normal_per_dim(a, b),
        "bernoulli_log_prob": lambda: fastkl.bernoulli_log_prob(a, b),
        "normal_log_prob": lambda: fastkl.normal_log_prob(a, b, c),
        "packed": lambda: fastkl.DiagonalNormal.from_packed(a).kl(),
    }
    inputs = {t.untyped_storage().data_ptr() for t in (a, b, c)}
    for name, call in calls.items():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            call()
        assert saved, name
        assert {t.untyped_storage().data_ptr() for t in saved} <= inputs, name


@both
def test_the_posterior_object_computes_in_float32(backend):
    """Rounded to bfloat16, ln sigma^2 of a softplus would bias the entropy of 16 x 64 x 64 latents by 160 nats."""
    head = torch.full((1, 32, 8, 8), -5.3, dtype=torch.bfloat16)
    for scale in ("softplus", "log_std"):
        q = fastkl.DiagonalNormal.from_packed(head, scale=scale)
        wide = fastkl.DiagonalNormal.from_packed(head.double(), scale=scale)
        with implementation(backend):
            assert q.entropy().item() == pytest.approx(wide.entropy().item(), rel=1e-6)
            assert q.log_prob(q.mean).item() == pytest.approx(wide.log_prob(wide.mean).item(), rel=1e-6)
            assert q.kl(q).item() == pytest.approx(0.0, abs=1e-6)
        assert q.std.dtype == q.var.dtype == q.logvar.dtype == torch.bfloat16
