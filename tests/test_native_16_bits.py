"""bfloat16 and float16 on a CPU: float32 loops that read and write 16 bits and round once."""

import pytest
import torch

import fastkl
from fastkl.native import _build, _pack

from helpers import DEVICE, implementation, on_any_threads, peak_bytes

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
]
in_16_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def packed(head):
    return fastkl.DiagonalNormal.from_packed(head, dim=1).rsample_kl(seed=1)


# What is drawn of "std" is positive. Each op with its inputs, of the shape or "event" or "row" or "one" of it.
OPS = {
    "kl_normal": (fastkl.kl_normal, "full", "full"),
    "kl_normal, std": (lambda m, s: fastkl.kl_normal(m, s, scale="std", bounds=(-2.0, 1.0)), "full", "std"),
    "kl_normal, prior": (fastkl.kl_normal, "full", "full", "full", "full"),
    "kl_normal, shared prior": (fastkl.kl_normal, "full", "full", "event", "event"),
    "kl_normal_per_dim": (fastkl.kl_normal_per_dim, "full", "full"),
    "wasserstein2_normal": (fastkl.wasserstein2_normal, "full", "full", "event", "event"),
    "rsample_normal": (lambda m, v: fastkl.rsample_normal(m, v, seed=1), "full", "full"),
    "rsample_normal, samples": (lambda m, v: fastkl.rsample_normal(m, v, seed=1, num_samples=3), "full", "full"),
    "rsample_kl": (lambda m, v: fastkl.rsample_kl(m, v, seed=1), "full", "full"),
    "rsample_kl, eps": (lambda m, v, e: fastkl.rsample_kl(m, v, eps=e), "full", "full", "full"),
    "packed": (packed, "full"),
    "normal_log_prob": (lambda *t: fastkl.normal_log_prob(*t, event_ndim=1), "full", "full", "full"),
    "normal_log_prob, row": (lambda *t: fastkl.normal_log_prob(*t, event_ndim=1), "full", "full", "row"),
    "normal_log_prob, event": (lambda *t: fastkl.normal_log_prob(*t, event_ndim=1), "full", "full", "event"),
    "bernoulli_log_prob": (lambda *t: fastkl.bernoulli_log_prob(*t, event_ndim=1), "full", "full"),
    "gumbel_softmax, hard": (lambda t: fastkl.gumbel_softmax(t, 0.7, hard=True, seed=1), "full"),
}
every_op = pytest.mark.parametrize("name", OPS)
# Short rows, one element, more than a tile in a row, more than a piece of work.
SHAPES = [(70, 10), (3000, 1), (3, 2500), (2, 17_000)]


def inputs(name, shape, dtype, strided=False):
    """Numbers that the dtype has."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"event": shape[-1:], "row": (shape[0], 1)}
    found = []
    for kind in OPS[name][1:]:
        own = (shape[0], 2 * shape[1]) if name == "packed" else shapes.get(kind, shape)
        drawn = torch.randn(*own, 2, generator=generator)[..., 0]  # every second element
        drawn = drawn.exp() if kind == "std" else drawn
        found.append(drawn.to(dtype) if strided else drawn.contiguous().to(dtype))
    return found


def results(name, tensors):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = OPS[name][0](*tensors)
    out = out if isinstance(out, tuple) else (out,)
    weights = [torch.linspace(0.5, 1, o.shape[0]).view(-1, *[1] * (o.dim() - 1)) for o in out]
    weights = [(64 * w).round().div(64).to(o.dtype).expand(o.shape) for w, o in zip(weights, out)]  # in any dtype
    return [*out, *torch.autograd.grad(out, tensors, weights)]


@in_16_bits
@every_op
def test_results_are_those_of_float32_rounded(name, dtype):
    """Values and gradients are bit-identical, in the memory layout of the closed forms."""
    _pack.plans.clear()  # drop the plans of earlier tests
    for shape in SHAPES:
        for strided in (False, True):
            given = inputs(name, shape, dtype, strided)
            with implementation("native"):
                actual, expected = (results(name, t) for t in (given, [t.float() for t in given]))
            assert None not in _pack.plans.values()
            for found, wide in zip(actual, expected):
                assert torch.equal(found, wide.to(found.dtype))
                assert found.stride() == wide.stride()
    with implementation("torch"):
        assert [t.dtype for t in results(name, given)] == [t.dtype for t in actual]


@every_op
def test_each_tensor_may_have_its_own_dtype(name):
    """What is broadcast comes in float32, and data may be of either kind."""
    given = inputs(name, (70, 10), torch.bfloat16)
    mixed = [t.to(dtype) for t, dtype in zip(given, (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16))]
    mixed = [wide.where(wide == t.float(), 0).to(wide.dtype) for wide, t in zip(mixed, given)]
    with implementation("native"):
        actual, expected = (results(name, t) for t in (mixed, [t.float() for t in mixed]))
    for found, wide in zip(actual, expected):
        assert torch.equal(found, wide.to(found.dtype))


@in_16_bits
def test_a_soft_choice_is_rounded_once(dtype):
    """Also of more classes than a piece of work has; its gradient is that of the rounded weights, which add up to 1."""
    for shape, dim in (((40, 10), 1), ((3, 20_000), 1), ((2, 9000, 40), 1), ((9000, 2), 0)):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        tau = torch.tensor(0.7, requires_grad=True)
        y = fastkl.gumbel_softmax(logits, tau, dim=dim, seed=1)
        assert torch.equal(y, fastkl.gumbel_softmax(logits.float(), tau, dim=dim, seed=1).to(dtype))
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = torch.autograd.grad(y, [logits, tau], dy)
        w = y.detach().double()
        w = w / w.sum(dim, keepdim=True)
        dlogits = w * (dy - (w * dy).sum(dim, keepdim=True)) / 0.7
        limits = torch.finfo(dtype)
        error = (found[0].double() - dlogits).abs() - 0.51 * limits.eps * dlogits.abs().clamp(min=limits.tiny)
        assert error.max() <= 1e-6 * dlogits.abs().max()
        dtau = -(dlogits * w.where(w > 0, 1.0).log()).sum()
        assert found[1].item() == pytest.approx(dtau.item(), rel=1e-4, abs=1e-4)
        hard = fastkl.gumbel_softmax(logits, tau, hard=True, dim=dim, seed=1)
        assert torch.equal(hard.sum(dim), torch.ones_like(hard.sum(dim)))


@in_16_bits
def test_what_is_not_finite_and_what_is_too_large(dtype):
    special = [float("nan"), float("inf"), float("-inf"), 0.0, 60.0, -60.0, torch.finfo(dtype).smallest_normal / 4]
    mu = torch.tensor([1.0, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 8, -0.0])
    mu, logvar = (t.to(dtype).flatten().unsqueeze(-1) for t in torch.meshgrid(mu, torch.tensor(special), indexing="ij"))
    eps = torch.ones_like(mu)
    with implementation("native"):
        z, kl = fastkl.rsample_kl(mu, logvar, eps=eps)
    with implementation("torch"):
        wanted, wide = fastkl.rsample_kl(mu, logvar, eps=eps)
    torch.testing.assert_close(z, wanted, equal_nan=True, rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(kl, wide, equal_nan=True)


@in_16_bits
@pytest.mark.parametrize("name", [name for name in OPS if "eps" not in name])  # whose own gradient is not fused
def test_memory_is_that_of_the_results(name, dtype):
    """No copy in float32: only results are allocated, forward and backward."""
    given = inputs(name, (512, 1024), dtype)
    results(name, given)  # plans are made
    expected = results(name, given)
    peak = peak_bytes(lambda: expected.append(results(name, given)))
    assert peak <= sum(t.nbytes for t in expected[:-1]) + 200_000


@in_16_bits
def test_threads_change_nothing(dtype):
    for name in ("kl_normal, shared prior", "rsample_kl", "normal_log_prob, event", "gumbel_softmax, hard"):
        on_any_threads(lambda name=name: results(name, inputs(name, (9000, 8), dtype)))
