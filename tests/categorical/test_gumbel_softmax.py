"""gumbel_softmax: every implementation against the float64 definition, whatever the shape, dtype and layout."""

import functools
import importlib
import math

import pytest
import torch

from fastkl import reference
from fastkl.ops.categorical.gumbel_softmax import gumbel_softmax
from fastkl.reference import Stream

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, implementation, launcher, leaf, on_any_threads

stats = Package("scipy.stats")

SEED = 2**62 + 12345
# (shape, dim): why
CASES = [
    ((11, 64), -1),  # aligned rows, in two blocks
    ((5, 37), -1),  # rows that begin in the middle of a Philox call
    ((3, 1), -1),  # one class
    ((7,), 0),  # no batch
    ((2, 9001), -1),  # two sweeps, several programs to a row, odd
    ((3, 5, 8), 1),  # classes in front of whole Philox calls
    ((2, 5, 3, 3), 1),  # pixels: an odd number of them
    ((600, 20), 0),  # two sweeps along the first dimension
    ((0, 4), -1),  # empty batch
]
INFINITY = math.inf
GUMBEL = Stream.GUMBEL
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])
hard_and_soft = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])


def draw(shape, dtype=torch.float32, spread=2.0):
    generator = torch.Generator().manual_seed(3)
    return leaf((spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype))


def run(function, logits, tau, **settings):
    y = function(logits, tau, **settings)
    dy = torch.arange(y.numel(), device=y.device).mul(0.7).cos().view(y.shape).to(y.dtype)
    inputs = [logits, tau] if isinstance(tau, torch.Tensor) else [logits]
    return [y, *torch.autograd.grad(y, inputs, dy)]


def check(logits, tau, **settings):
    """The error against the definition in float64 is at most that of the definition in this dtype."""
    wide_tau = leaf(tau.double()) if isinstance(tau, torch.Tensor) else tau
    fixed = settings | {"seed": torch.tensor(SEED, device=DEVICE)}
    exact = run(reference.gumbel_softmax, leaf(logits.double()), wide_tau, **fixed)
    eager = run(reference.gumbel_softmax, logits, tau, **fixed)
    actual = run(gumbel_softmax, logits, tau, seed=SEED, **settings)
    # The temperature's gradient is a sum of dlogits ln y, which cancel: what is rounded is each of them. A soft sample
    # keeps y for them, in the logits' dtype.
    weights = run(reference.gumbel_softmax, leaf(logits.double()), wide_tau, **fixed | {"hard": False})[0]
    terms = (exact[1] * weights.clamp(min=1e-300).log()).abs().sum() if logits.numel() else None
    kept = 1 if settings.get("hard") else torch.finfo(logits.dtype).eps / torch.finfo(torch.float32).eps
    for x, e, a in zip(exact, eager, actual):
        assert a.dtype == e.dtype
        # The noise is float32, at its largest to 1e-6: two implementations agree to 1e-6 / tau,
        # also in float64.
        units = {torch.float32: 32, torch.float64: 32 * 2**29}.get(logits.dtype, 4)
        if x.dim() == 0:
            units, scale = units * max(1, kept), terms
        else:
            scale = x.abs().max() if x.numel() else None
        assert_as_good_as_eager(a, e, x, units=units, scale=scale)


@both
@hard_and_soft
@pytest.mark.parametrize(("shape", "dim"), CASES, ids=str)
def test_shapes(backend, shape, dim, hard):
    with implementation(backend):  # a tensor's gradient is the same for both
        check(draw(shape), 0.7 if hard else leaf(torch.tensor(0.7)), hard=hard, dim=dim)


# Enough elements for two threads: long rows in chunks, rows of two tiles, short rows; many neighbours of a class, in
# chunks of two blocks and in one block; few of them.
LARGE = [((4, 9001), -1), ((20, 1700), -1), ((5000, 7), -1), ((2, 70, 301), 1), ((30, 5, 250), 1), ((9000, 4), 0)]


@pytest.mark.parametrize(("hard", "dtype"), [(False, torch.float32), (True, torch.float64)], ids=str)
@pytest.mark.parametrize(("shape", "dim"), LARGE, ids=str)
def test_native_loops_share_their_work(shape, dim, dtype, hard):
    logits, tau = draw(shape, dtype), leaf(torch.tensor(0.7, dtype=dtype))
    with implementation("native"):
        on_any_threads(lambda: run(gumbel_softmax, logits, tau, hard=hard, dim=dim, seed=SEED))
        check(logits, tau, hard=hard, dim=dim)


@pytest.mark.parametrize(("shape", "dim"), LARGE, ids=str)
def test_native_loops_keep_what_a_chunk_finds(shape, dim):
    """Infinities and NaN in one of many chunks, and ties, in the last distribution only."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).movedim(dim, -1)
    last = (-1,) * (whole.dim() - 1)
    for value, result in ((-INFINITY, 0.0), (INFINITY, math.nan), (math.nan, math.nan), (1e9, None)):
        logits = whole.clone()
        if value in (-INFINITY, 1e9):
            logits[last] = value
        else:
            logits[last][-1] = value
        for tau, hard in ((0.7, False), (0.7, True), (0.0, False)):
            with implementation("native"):
                y = gumbel_softmax(logits.movedim(-1, dim).to(DEVICE), tau, hard, dim=dim, seed=SEED).movedim(dim, -1)
            total = y.sum(-1)
            assert (total.flatten()[:-1] - 1).abs().max() < 1e-5
            if result is not None:
                torch.testing.assert_close(y[last], torch.full_like(y[last], result), equal_nan=True)
            elif hard or tau == 0:  # the noise is rounded away: the first of all
                assert y[last][0] == total[last] == 1
            else:
                torch.testing.assert_close(y[last], torch.full_like(y[last], 1 / y.shape[-1]))


@hard_and_soft
@pytest.mark.parametrize(("shape", "dim"), [((2, 601), -1), ((20, 6), 0)], ids=str)
def test_one_program_sweeps_many_tiles(monkeypatch, shape, dim, hard):
    """As with millions of classes: a program carries its result from tile to tile."""
    for name, value in (("WHOLE", 256), ("PART", 128), ("SPLITS", 2)):
        monkeypatch.setattr(importlib.import_module("fastkl.kernels.categorical.gumbel_softmax"), name, value)
    with implementation("triton"):
        check(draw(shape), 0.7 if hard else leaf(torch.tensor(0.7)), hard=hard, dim=dim)


@both
@hard_and_soft
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype, hard):
    with implementation(backend):
        for tau in (0.5, leaf(torch.tensor(2.0))):
            check(draw((6, 24), dtype, spread=1.0), tau, hard=hard)


@both
@hard_and_soft
def test_strided(backend, hard):
    base = draw((4, 6, 10)).detach()
    views = [base[:, :, ::2], base.transpose(0, 2), base.expand(2, 4, 6, 10), base[:, 1:4].movedim(1, 0)]
    for view in views:
        for dim in (-1, 1):
            with implementation(backend):
                check(view.requires_grad_(), 0.7, hard=hard, dim=dim)
    logits = draw((4, 10))
    with implementation(backend):
        gradient = torch.autograd.grad(gumbel_softmax(logits, 0.7, hard, seed=1).sum(), logits)[0]  # stride 0
    assert gradient.abs().max() < 1e-6


def aot_calls():
    fwd, bwd, seed = launcher("gumbel_softmax.fwd"), launcher("gumbel_softmax.bwd"), torch.zeros((), dtype=torch.int64)
    calls = {}

    def add(name, shape, dtype=torch.float32, dim=1, tensor=False):
        x, tau = torch.empty(shape, dtype=dtype), torch.ones(()) if tensor else None
        given, hard, soft = (tau, seed, x, tau), (0.5, True, dim, GUMBEL), (0.5, False, dim, GUMBEL)
        calls[f"{name} soft fwd"] = functools.partial(fwd, x, tau, seed, *soft)
        calls[f"{name} hard bwd"] = functools.partial(bwd, x, None, x, *given, *hard)
        if name.startswith("core") or tensor:  # the others: one without the sum, one without the noise
            calls[f"{name} hard fwd"] = functools.partial(fwd, x, tau, seed, *hard)
            calls[f"{name} soft bwd"] = functools.partial(bwd, x, x, None, *given, *soft)

    add("core aligned", (4096, 512), torch.bfloat16)
    add("aligned largest tile", (64, 8192))
    add("two sweeps", (4, 1 << 17), torch.bfloat16)
    add("aligned pixels", (16, 64, 1024), tensor=True)
    add("odd", (4096, 37), tensor=True)
    add("odd largest tile", (64, 8189))
    add("odd two sweeps", (4, 65537), torch.bfloat16)
    add("odd pixels", (16, 64, 49))
    add("odd pixels, two sweeps", (16, 8192, 49), tensor=True)
    add("pixels, two sweeps", (16, 8192, 1024))
    add("few pixels, two sweeps", (1, 600, 20), tensor=True)
    add("float64 largest tile", (64, 4096), torch.float64, tensor=True)
    add("float64 two sweeps", (4, 65536), torch.float64)
    return calls
