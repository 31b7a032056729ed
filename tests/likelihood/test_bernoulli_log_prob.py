"""bernoulli_log_prob: both implementations against the float64 definition, torch.distributions and scipy."""

import inspect
import itertools
import math

import pytest
import torch

from fastkl import reference
from fastkl.ops.likelihood.bernoulli_log_prob import bernoulli_log_prob

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, implementation, launcher, leaf, on_any_threads

stats = Package("scipy.stats")

# (shape, event_ndim): why
SHAPES = [
    ((8, 64), None),  # aligned rows
    ((3, 37), None),  # odd columns: masked tail, unaligned rows
    ((2, 5000), None),  # a long row, several programs share it
    ((300, 1), None),  # many rows of one element
    ((2, 4, 6, 5), None),  # images
    ((5, 3, 20), 1),  # two batch dimensions
    ((7,), 1),  # no batch dimension
    ((0, 4), None),  # empty batch
    ((3, 0), None),  # empty event
]
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def draw(shape, dtype=torch.float32, x_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    x = torch.rand(shape, generator=generator) * 1.5 - 0.25  # outside [0, 1] too
    return [leaf(logits.to(dtype)), leaf(x.to(x_dtype))]


def run(function, tensors, event_ndim, weights):
    """Value and gradients of sum(weights * log-likelihood)."""
    logits, x = tensors
    value = function(x, logits, event_ndim=event_ndim)
    return [value, *torch.autograd.grad(value, tensors, weights.to(value.dtype).expand(value.shape))]


def check(tensors, event_ndim=None):
    logits, x = (t.double() for t in tensors)
    exact = reference.bernoulli_log_prob(x, logits, event_ndim=event_ndim)
    weights = torch.linspace(-1, 2, exact.numel(), dtype=torch.float64, device=exact.device).view(exact.shape)
    exact = run(reference.bernoulli_log_prob, [leaf(t.double()) for t in tensors], event_ndim, weights)
    eager = run(reference.bernoulli_log_prob, tensors, event_ndim, weights)
    actual = run(bernoulli_log_prob, tensors, event_ndim, weights)
    for got, naive, truth in zip(actual, eager, exact):
        # Terms of a sum cancel: rounding is relative to the largest term, not to the result.
        scale = truth.abs().max() if truth.numel() else None
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=scale)
    assert [result.dtype for result in actual] == [reference.compute_dtype(*tensors), *(t.dtype for t in tensors)]


@both
@pytest.mark.parametrize(("shape", "event_ndim"), SHAPES, ids=str)
def test_shapes(backend, shape, event_ndim):
    with implementation(backend):
        check(draw(shape), event_ndim)


def test_native_loops_share_their_work():
    """Enough elements for two threads: long rows in chunks, rows of two tiles, short rows."""
    for shape in [(4, 9001), (20, 1700), (9000, 4)]:
        tensors = draw(shape)
        weights = torch.linspace(-1, 2, shape[0], dtype=torch.float64, device=DEVICE)
        with implementation("native"):
            on_any_threads(lambda: run(bernoulli_log_prob, tensors, None, weights))  # noqa: B023
            check(tensors)


@both
@pytest.mark.parametrize("one_of_two", [0, 1])
def test_only_wanted_gradients(backend, one_of_two):
    tensors = draw((3, 5))
    with implementation(backend):
        value = bernoulli_log_prob(*reversed(tensors))
        both = torch.autograd.grad(value.sum(), tensors, retain_graph=True)
        tensors[1 - one_of_two] = tensors[1 - one_of_two].detach()
        alone = torch.autograd.grad(bernoulli_log_prob(*reversed(tensors)).sum(), tensors[one_of_two])
    assert torch.equal(alone[0], both[one_of_two])


@both
def test_logits_and_data_of_any_two_dtypes(backend):
    wide, narrow = torch.float64, torch.bfloat16
    pairs = itertools.product(DTYPES, DTYPES)
    for dtypes in set(pairs) - {(wide, narrow), (narrow, wide)}:  # the interpreter cannot store one as the other
        with implementation(backend):
            check(draw((2, 24), *dtypes))


@both
@pytest.mark.parametrize("view", ["samples", "one image", "transposed", "every other", "channels_last"])
def test_strided_inputs_are_read_where_they_lie(backend, view):
    base = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(1))
    logits, x = {
        "samples": lambda: (base, base[0]),  # x is expanded over importance samples
        "one image": lambda: (base, base[0, 0, 0]),
        "transposed": lambda: (base[0, 0].t(), base[1, 1].t()),
        "every other": lambda: (base[..., ::2], base[..., 1::2]),
        "channels_last": lambda: (base.to(memory_format=torch.channels_last), base.flip(0)),
    }[view]()
    ones = torch.ones((), device=DEVICE)  # the gradient of .sum() has a stride of 0
    for event_ndim in range(1, logits.dim() + 1):
        leaves = [t.to(DEVICE).detach().requires_grad_() for t in (logits, x)]
        exact = [t.double().detach().requires_grad_() for t in leaves]
        with implementation(backend):
            actual = run(bernoulli_log_prob, leaves, event_ndim, ones)
        for got, truth in zip(actual, run(reference.bernoulli_log_prob, exact, event_ndim, ones)):
            torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=1e-5)


@both
def test_agrees_with_torch_distributions_and_scipy(backend):
    logits, x = (torch.tensor([row], dtype=torch.float64, device=DEVICE) for row in ([-2.0, 0.3, 1.7], [0.0, 1.0, 1.0]))
    with implementation(backend):
        actual = bernoulli_log_prob(x, logits).item()
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum().item()
    assert actual == pytest.approx(expected, rel=1e-12)
    assert actual == pytest.approx(stats.bernoulli.logpmf(x.cpu(), torch.sigmoid(logits).cpu()).sum(), rel=1e-12)


@both
def test_large_logits_do_not_overflow(backend):
    logits = torch.tensor([-3e38, -89.0, -20.0, -1e-7, 0.0, 1e-7, 20.0, 89.0, 3e38])[:, None]
    with implementation(backend):
        for x in (0.0, 0.25, 1.0):
            check([leaf(logits), leaf(torch.full_like(logits, x))])
        if backend != "torch":  # x l - softplus(l) is 0 here in float32; the loops subtract nothing large
            value = bernoulli_log_prob(torch.ones(1, 1, device=DEVICE), torch.full((1, 1), 20.0, device=DEVICE))
            assert value.item() == pytest.approx(-math.log1p(math.exp(-20.0)), rel=4e-6)


@both
def test_non_finite_rows_stay_by_themselves(backend):
    bad = [(math.nan, 0.0), (math.inf, 0.0), (-math.inf, 1.0), (0.0, math.nan), (1.0, math.inf)]
    logits, x = torch.zeros(11, 3), torch.zeros(11, 3)
    logits[1::2, 1], x[1::2, 1] = torch.tensor(bad).unbind(1)
    logits = leaf(logits)
    with implementation(backend):
        value = bernoulli_log_prob(x.to(DEVICE), logits)
        value.sum().backward()
    assert value.isfinite().tolist() == [i % 2 == 0 for i in range(11)]
    assert (logits.grad[::2] == -0.5).all()


def test_likelihood_takes_data_before_logits():
    x, logits = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]])
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(1)
    for likelihood in (bernoulli_log_prob, reference.bernoulli_log_prob):
        torch.testing.assert_close(likelihood(x, logits), expected)
        assert list(inspect.signature(likelihood).parameters)[:2] == ["x", "logits"]


def test_bad_arguments_are_named():
    for arguments, settings, message in [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), {}, r"x \(2, 3\), logits \(2, 4\)"),
        ((torch.zeros(()), torch.zeros(())), {}, "event_ndim=1 needs at least 1 dimensions"),
        ((torch.zeros(2, 3), torch.zeros(2, 3, device="meta")), {}, "logits is on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            bernoulli_log_prob(*arguments, **settings)
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got dtype torch.uint8"):
        bernoulli_log_prob(torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3))


def aot_calls():
    calls, fwd, bwd = {}, launcher("bernoulli_log_prob.fwd"), launcher("bernoulli_log_prob.bwd")

    def add(name, shape, dtype=torch.float32, x_dtype=None, wanted=(True, False), samples=False):
        logits, x = torch.empty(shape, dtype=dtype), torch.empty(shape[samples:], dtype=x_dtype or dtype).expand(shape)
        inputs, event_ndim = (logits, x), len(shape) - 1 - samples
        calls[f"{name} fwd"] = lambda: fwd(*inputs, event_ndim)
        dlog_prob = torch.empty(shape[: 1 + samples], dtype=reference.compute_dtype(*inputs))
        outputs = [torch.empty_like(tensor) if want else None for tensor, want in zip(inputs, wanted)]
        calls[f"{name} bwd"] = lambda: bwd(dlog_prob, *inputs, *outputs, event_ndim)

    add("core aligned float32", (4096, 512))
    add("core aligned bfloat16 float32 dx", (4096, 512), torch.bfloat16, torch.float32, (True, True))
    add("aligned bfloat16 long row", (2, 1 << 20), torch.bfloat16)
    add("aligned float16 short rows", (4096, 16), torch.float16)
    add("aligned samples", (16, 64, 3, 32, 32), samples=True)
    add("odd float64 dx only", (37, 37), torch.float64, wanted=(False, True))
    return calls
