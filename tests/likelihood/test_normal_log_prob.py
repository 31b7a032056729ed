"""normal_log_prob: both implementations against the float64 definition, torch.distributions and scipy."""

import math

import numpy as np
import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.likelihood.normal_log_prob import normal_log_prob

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, implementation, launcher, leaf, on_any_threads

stats = Package("scipy.stats")

# (shape, event_ndim): why
SHAPES = [
    ((8, 64), None),  # aligned rows
    ((3, 37), None),  # odd columns: masked tail, unaligned rows
    ((2, 5000), None),  # a long row, several programs share it
    ((70, 1), None),  # many rows of one element
    ((70, 40), None),  # several programs sum the gradient of a shared logvar
    ((3, 4, 6, 5), None),  # images, all of each summed
    ((5, 3, 20), 1),  # two batch dimensions
    ((7,), 1),  # one sample, no batch dimension
    ((0, 4), None),  # empty batch
    ((3, 0), None),  # empty event
]
SPREADS = ["full", "scalar", "row", "shared"]  # a log-variance an element, one in all, a sample, a dimension
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def draw(shape, event_ndim=None, spread="full", dtypes=(torch.float32,) * 3):
    generator = torch.Generator().manual_seed(0)
    batch_ndim = 1 if event_ndim is None else len(shape) - event_ndim
    batch, event = shape[:batch_ndim], shape[batch_ndim:]
    third = {"full": shape, "scalar": (), "row": (*batch, *[1] * len(event)), "shared": event}[spread]
    return [leaf(torch.randn(s, generator=generator).to(dtype)) for s, dtype in zip((shape, shape, third), dtypes)]


def run(function, tensors, event_ndim, weights):
    """Value and gradients of sum(weights * log-likelihood)."""
    value = function(*tensors, event_ndim=event_ndim)
    return [value, *torch.autograd.grad(value, tensors, weights.to(value.dtype).expand(value.shape))]


def check(tensors, event_ndim=None):
    exact = reference.normal_log_prob(*(t.double() for t in tensors), event_ndim=event_ndim)
    weights = torch.linspace(-1, 2, exact.numel(), dtype=torch.float64, device=exact.device).view(exact.shape)
    exact = run(reference.normal_log_prob, [leaf(t.double()) for t in tensors], event_ndim, weights)
    eager = run(reference.normal_log_prob, tensors, event_ndim, weights)
    actual = run(normal_log_prob, tensors, event_ndim, weights)
    for index, (got, naive, truth) in enumerate(zip(actual, eager, exact)):
        # Terms of a sum cancel: its rounding is relative to its largest value, not to what is left; in a sum for logvar
        # over the batch, the terms are about as large as its number of elements for each value.
        scale = truth.abs().max() if truth.numel() else None
        if index == 3 and truth.numel() and got.shape != actual[2].shape:
            scale = scale + tensors[0].numel() / truth.numel()
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=scale)
    assert [result.dtype for result in actual] == [reference.compute_dtype(*tensors), *(t.dtype for t in tensors)]


@both
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("shape", "event_ndim"), SHAPES, ids=str)
def test_shapes(backend, shape, event_ndim, spread):
    with implementation(backend):
        check(draw(shape, event_ndim, spread), event_ndim)


@pytest.mark.parametrize(
    ("spread", "dtype"), [(each, torch.float32) for each in ("full", "row", "shared")] + [("shared", torch.float64)]
)
def test_native_loops_share_their_work(spread, dtype):
    """Enough elements for two threads: long rows in chunks, rows of two tiles, short rows in several groups."""
    for shape in [(4, 9001), (20, 1700), (9000, 4)]:
        tensors = draw(shape, None, spread, (dtype,) * 3)
        weights = torch.linspace(-1, 2, shape[0], dtype=torch.float64, device=DEVICE)
        with implementation("native"):
            on_any_threads(lambda: run(normal_log_prob, tensors, None, weights))  # noqa: B023
            check(tensors)


@both
@pytest.mark.parametrize("spread", ["full", "row", "shared"])
def test_dtypes(backend, spread):
    mixed = [(torch.float32, torch.bfloat16, torch.float32), (torch.float64, torch.float32, torch.float16)]
    for dtypes in [*((dtype,) * 3 for dtype in DTYPES), *mixed]:
        with implementation(backend):
            check(draw((4, 24), None, spread, dtypes))


@both
@pytest.mark.parametrize("view", ["samples", "transposed", "every other", "channels_last"])
def test_strided_inputs_are_read_where_they_lie(backend, view):
    base = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    plane = base[0].transpose(1, 2)
    x, mean, *logvars = {
        "samples": lambda: (base[0], base, base[:, :1], base[0, 0]),  # x is expanded over importance samples
        "transposed": lambda: (plane[0], plane[1], plane[2], plane[2, :, :1], plane[2, :1]),
        "every other": lambda: (base[..., ::2], base[..., 1::2], base[1, 1, :, ::2], base[:, ::3, ::6, :1][:, :1]),
        "channels_last": lambda: (base, base.to(memory_format=torch.channels_last), base[0].flip(0), base.exp()),
    }[view]()
    ones = torch.ones((), device=DEVICE)  # the gradient of .sum() has a stride of 0
    for event_ndim in range(1, mean.dim() + 1):
        for logvar in logvars:
            leaves = [t.to(DEVICE).detach().requires_grad_() for t in (x, mean, logvar)]
            exact = [t.double().detach().requires_grad_() for t in leaves]
            with implementation(backend):
                actual = run(normal_log_prob, leaves, event_ndim, ones)
            for got, truth in zip(actual, run(reference.normal_log_prob, exact, event_ndim, ones)):
                torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-4)


@both
@pytest.mark.parametrize("spread", ["full", "row", "shared"])
def test_only_wanted_gradients(backend, spread):
    tensors = draw((3, 5), None, spread)
    with implementation(backend):
        everything = torch.autograd.grad(normal_log_prob(*tensors).sum(), tensors)
        for index in range(3):
            some = [t if i == index else t.detach() for i, t in enumerate(tensors)]
            alone = torch.autograd.grad(normal_log_prob(*some).sum(), some[index])
            assert torch.equal(alone[0], everything[index])


@both
def test_agrees_with_torch_distributions_and_scipy(backend):
    x, mean, std = (torch.tensor([row], dtype=torch.float64) for row in ([0.7, -1.0], [0.1, 2.0], [0.4, 1.5]))
    with implementation(backend):
        actual = normal_log_prob(*(t.to(DEVICE) for t in (x, mean, 2 * std.log()))).item()
    assert actual == pytest.approx(torch.distributions.Normal(mean, std).log_prob(x).sum().item(), rel=1e-12)
    assert actual == pytest.approx(stats.norm.logpdf(x, mean, std).sum(), rel=1e-12)


@both
def test_extreme_and_non_finite_values(backend):
    """Exact where finite (1 / sigma^2 would overflow at -100), and non-finite in their own row only."""
    logvar = torch.tensor([-100.0, -80.0, -30.0, 0.0, 30.0, 80.0, 100.0])[:, None]
    bad = [(math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, math.inf), (1.0, -math.inf)]
    mean, logvars = torch.zeros(11, 3), torch.zeros(11, 3)
    mean[1::2, 1], logvars[1::2, 1] = torch.tensor(bad).unbind(1)
    with implementation(backend):
        check([leaf(1e-15 * torch.ones(7, 1)), leaf(torch.zeros(7, 1)), leaf(logvar)])
        for spread in (logvars, logvars[:, 1:2]):
            leaves = leaf(mean), leaf(spread)
            value = normal_log_prob(torch.zeros(11, 3, device=DEVICE), *leaves)
            value.sum().backward()
            assert value.isfinite().tolist() == [i % 2 == 0 for i in range(11)]
            assert (leaves[0].grad[::2] == 0).all()
            assert (leaves[1].grad[::2] == -0.5 * 3 / spread.shape[1]).all()


@both
@pytest.mark.parametrize("spread", ["full", "row", "shared"])
def test_a_square_that_overflows_is_finite_under_a_small_weight(backend, spread):
    """The row of weight 0 beside it adds nothing, also where z itself has overflowed."""
    x = torch.tensor([[3e12, -2e12], [1e30, 1e38]], device=DEVICE)
    logvar = torch.full({"full": (2, 2), "row": (2, 1), "shared": (2,)}[spread], -40.0, device=DEVICE)
    weight = torch.tensor([1e-12, 0.0], device=DEVICE)
    leaves = [leaf(tensor) for tensor in (x, torch.zeros_like(x), logvar)]
    with implementation(backend):
        actual = torch.autograd.grad(normal_log_prob(*leaves), leaves, weight)
    dmean = weight.double()[:, None] * x.double() * math.exp(40.0)
    dlogvar = 0.5 * weight.double()[:, None] * (x.double().square() * math.exp(40.0) - 1)
    for got, exact in zip(actual, (-dmean, dmean, dlogvar.sum_to_size(logvar.shape))):
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=1e-20)


def test_bad_arguments_are_named():
    zeros = torch.zeros(2, 3)
    for arguments, event_ndim, message in [
        ((zeros, zeros, torch.zeros(4)), None, r"x \(2, 3\), mean \(2, 3\), logvar \(4,\)"),
        ((zeros[0, 0], zeros[0, 0], zeros[0, 0]), None, "event_ndim=1 needs at least 1 dimensions"),
        ((zeros, zeros, zeros), 3, "event_ndim=3 needs"),
        ((zeros, zeros, torch.zeros((), device="meta")), None, "logvar is on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            normal_log_prob(*arguments, event_ndim=event_ndim)
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got float"):
        normal_log_prob(0.0, zeros, zeros)


def aot_calls():
    calls, fwd, bwd = {}, launcher("normal_log_prob.fwd"), launcher("normal_log_prob.bwd")

    def add(name, shape, spread="full", dtypes=(torch.float32,) * 3, wanted=(False, True, True)):
        inputs = [tensor.detach() for tensor in draw(shape, None, spread, dtypes)]
        if spread == "scalar":
            inputs[2] = inputs[2].expand(shape[0], *[1] * (len(shape) - 1))
        dlog_prob = torch.empty(shape[0], dtype=reference.compute_dtype(*inputs))
        calls[f"{name} {spread} fwd"] = lambda: fwd(*inputs, len(shape) - 1)
        outputs = [torch.empty_like(tensor) if want else None for tensor, want in zip(inputs, wanted)]
        calls[f"{name} {spread} bwd"] = lambda: bwd(dlog_prob, *inputs, *outputs, len(shape) - 1)

    bfloat16, half = (torch.bfloat16,) * 3, (torch.float16,) * 3
    add("core aligned float16", (4096, 512), "scalar", half)
    add("core aligned bfloat16", (64, 512), "shared", bfloat16)
    add("aligned bfloat16", (64, 512), "full", bfloat16, (True, True, True))
    add("aligned float32 and bfloat16", (64, 512), "row", (torch.float32, torch.bfloat16, torch.float32))
    add("aligned long row", (2, 1 << 20), "row", bfloat16)
    add("aligned float32 short rows", (4096, 16), "shared")
    add("odd float64", (37, 37), "shared", (torch.float64,) * 3, (True, True, True))
    add("odd", (37, 37), "full", bfloat16)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_parameters(dtype):
    x = torch.linspace(-2, 2, 12, dtype=torch.float64, device=DEVICE).view(4, 3).to(dtype)
    mean, logvar = 0.3, -1.7
    exact = torch.distributions.Normal(mean, math.exp(logvar / 2)).log_prob(x.double()).sum(1)
    for given in ((x, mean, logvar), (x, torch.full_like(x, mean, dtype=torch.float64), np.float64(logvar))):
        torch.testing.assert_close(fastkl.normal_log_prob(*given).double(), exact, rtol=1e-6, atol=1e-6)
    assert fastkl.normal_log_prob(x, 0, 0.0).dtype == torch.promote_types(dtype, torch.float32)
    p, q = (torch.distributions.Normal(m, s) for m, s in ((0.5, 2.0), (x.double(), math.exp(logvar / 2))))
    kl = torch.distributions.kl_divergence(q, p)
    prior = (0.5, 2 * math.log(2.0))
    torch.testing.assert_close(fastkl.kl_normal(x, logvar, *prior).double(), kl.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fastkl.kl_normal_per_dim(x, logvar, *prior).double(), kl.mean(0), rtol=1e-5, atol=1e-5)
    distance = (x.double() - 0.5).square().sum(1) + 3 * (math.exp(logvar / 2) - 2) ** 2
    torch.testing.assert_close(fastkl.wasserstein2_normal(x, logvar, *prior).double(), distance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [True, "0", 1j])
def test_what_is_no_number_is_no_parameter(bad):
    with pytest.raises(TypeError, match=r"logvar must be a torch.Tensor"):
        fastkl.normal_log_prob(torch.zeros(2, 3), 0.0, bad)
