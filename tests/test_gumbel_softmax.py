"""gumbel_softmax: noise and distribution, both implementations against the float64 definition, extreme values."""

import functools
import importlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fastkl import reference
from fastkl.ops.gumbel_softmax import gumbel_softmax
from fastkl.reference import Stream, discrete

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


@pytest.fixture
def many_rows(monkeypatch):
    """Few programs for thousands of short rows: the interpreter's time is by program."""
    monkeypatch.setattr(importlib.import_module("fastkl.kernels.gumbel_softmax"), "SHORT", 8192)


def check(logits, tau, **settings):
    """Against the definition in float64, at most as far off as the definition in this dtype."""
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
    """Infinities and NaN in one chunk of many, and ties of several: in the last distribution, the others have none."""
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
    """As with millions of classes: what a program has found goes on from tile to tile."""
    for name, value in (("WHOLE", 256), ("PART", 128), ("SPLITS", 2)):
        monkeypatch.setattr(importlib.import_module("fastkl.kernels.gumbel_softmax"), name, value)
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


@both
def test_noise_is_gumbel_in_both_tails(backend, many_rows):
    """Two classes: the difference of their logits is that of their noise, a logistic variable; one: from the words."""
    seed = torch.tensor(SEED, device=DEVICE)
    noise = reference.gumbel_noise(seed, (200, 501)).double()
    assert stats.kstest(noise.flatten().cpu().numpy(), "gumbel_r").pvalue > 1e-3
    with implementation(backend):
        y = gumbel_softmax(torch.zeros(20_000, 2, device=DEVICE), 1.0, seed=SEED).double()
    difference = (y[:, 0].log() - y[:, 1].log()).cpu().numpy()
    assert stats.kstest(difference, "logistic").pvalue > 1e-3
    # Extreme words are finite, and right to rounding.
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=torch.float64)
    u = (words + 0.5) / 2**32
    exact = -torch.log(torch.where(u < 0.5, -torch.log(u), -torch.log1p(-(1 - u))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discrete, "philox", lambda *_: list(words.long().view(-1, 3)[:, :, None].unbind(1)) * 2)
        drawn = reference.gumbel_noise(torch.tensor(0), (12,)).view(2, 6)[:, :3].flatten().double()
    torch.testing.assert_close(drawn.sort()[0], exact.sort()[0], rtol=1e-6, atol=1e-7)


@both
@hard_and_soft
def test_largest_weight_has_the_class_probability(backend, hard, many_rows):
    logits = torch.tensor([0.4, -1.0, 1.3, 0.0, -INFINITY, 0.7], device=DEVICE)
    with implementation(backend):
        y = gumbel_softmax(logits.expand(20_000, 6), 0.3, hard, seed=SEED)
    counts = torch.bincount(y.argmax(-1), minlength=6).double().cpu()
    expected = 20_000 * logits.double().softmax(-1).cpu()
    assert counts[4] == 0
    keep = [0, 1, 2, 3, 5]
    assert stats.chisquare(counts[keep].numpy(), expected[keep].numpy()).pvalue > 1e-3


def test_distribution_is_torchs():
    """The same as torch.nn.functional's and as torch.distributions' relaxed one-hot, weight by weight."""
    torch.manual_seed(0)
    logits, tau = torch.tensor([0.4, -1.0, 1.3]), torch.tensor(0.6)
    ours = gumbel_softmax(logits.expand(20_000, 3), tau).double()
    others = F.gumbel_softmax(logits.expand(20_000, 3), 0.6)
    relaxed = torch.distributions.RelaxedOneHotCategorical(tau, logits=logits).sample((20_000,))
    for column in range(3):
        for other in (others, relaxed):
            assert stats.ks_2samp(ours[:, column].numpy(), other[:, column].double().numpy()).pvalue > 1e-3


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_small_temperature_is_the_one_hot_limit(backend, dtype):
    logits, seen = draw((5, 16), dtype), []
    with implementation(backend):
        one_hot = gumbel_softmax(logits, 1.0, True, seed=SEED)
        for tau in (0.0, torch.tensor(0.0), 1e-30, 1e-6, torch.tensor(1e-6), torch.tensor(1e-41)):
            for hard in (False, True):
                tau = leaf(tau) if isinstance(tau, torch.Tensor) else tau
                y, *gradients = run(gumbel_softmax, logits, tau, hard=hard, seed=SEED)
                assert torch.equal(y, one_hot)
                assert all((gradient == 0).all() for gradient in gradients)
                seen.append(y)
    assert len(seen) == 12
    assert ((one_hot == 1).sum(-1) == 1).all()
    assert one_hot.sum() == 5


@both
@hard_and_soft
def test_masked_classes_weigh_nothing(backend, hard):
    logits = draw((4, 6)).detach()
    logits[0, 2], logits[1, 1:], logits[2] = -INFINITY, -INFINITY, -INFINITY
    logits.requires_grad_()
    masked = logits == -INFINITY
    with implementation(backend):
        for tau in (0.5, leaf(torch.tensor(0.5)), leaf(torch.tensor(0.0))):
            y, *gradients = run(gumbel_softmax, logits, tau, hard=hard, seed=SEED)
            assert (y[masked] == 0).all()
            assert (gradients[0][masked] == 0).all()
            assert all(g.isfinite().all() for g in gradients)
            torch.testing.assert_close(y.sum(-1), torch.tensor([1.0, 1.0, 0.0, 1.0], device=DEVICE))


@both
@hard_and_soft
def test_nan_and_infinity_are_seen(backend, hard):
    logits = torch.zeros(3, 4, device=DEVICE)
    logits[0, 1], logits[1, 2] = math.nan, INFINITY
    with implementation(backend):
        for tau in (0.5, 0.0, torch.tensor(0.5)):
            y = gumbel_softmax(logits, tau, hard, seed=SEED)
            assert y[:2].isnan().all()
            assert y[2].isfinite().all()


@hard_and_soft
@pytest.mark.parametrize("tau", [-0.5, math.nan])
def test_a_temperature_that_no_one_reads_back_is_seen(tau, hard):
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    fixed = (torch.tensor(tau, device=DEVICE), seed, 1.0, hard, 1, GUMBEL)
    x = torch.zeros(3, 4, device=DEVICE)
    assert launcher("gumbel_softmax.fwd")(x, *fixed).isnan().all()
    y_and_logits = (None, x) if hard else (x + 0.25, None)
    assert launcher("gumbel_softmax.bwd")(x + 1, *y_and_logits, *fixed, False)[0].isnan().all()


def test_float16_overflow_of_torch_is_not_ours():
    """torch divides by the temperature in float16: 10 / 1e-4 is infinite there, and the softmax NaN."""
    logits = torch.full((64, 8), 10.0, dtype=torch.float16, device=DEVICE)
    torch.manual_seed(0)
    assert F.gumbel_softmax(logits, tau=1e-4).isnan().any()  # the defect is real
    assert gumbel_softmax(logits, tau=1e-4).isfinite().all()


def test_hard_gradient_is_the_soft_one_and_second_derivatives():
    logits, tau = draw((3, 4), torch.float64), leaf(torch.tensor(0.7, dtype=torch.float64))
    for dim in (0, 1):
        function = functools.partial(gumbel_softmax, dim=dim, seed=SEED)
        assert gradcheck(function, (logits, tau))
        assert gradgradcheck(function, (logits, tau))
    soft, hard = (run(gumbel_softmax, logits, tau, hard=hard, seed=SEED) for hard in (False, True))
    torch.testing.assert_close(soft[1:], hard[1:])
    assert ((hard[0] == 0) | (hard[0] == 1)).all()


def test_annealing_does_not_recompile():
    logits, compilations = draw((3, 4)), []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    for make, allowed in ((float, 2), (torch.tensor, 1)):
        torch._dynamo.reset()
        compilations.clear()
        compiled = torch.compile(lambda x, t: gumbel_softmax(x, t, seed=SEED), fullgraph=True, backend=backend)
        for tau in (1.0, 0.9, 0.8, 0.75, 0.6):
            torch.testing.assert_close(compiled(logits, make(tau)), gumbel_softmax(logits, tau, seed=SEED))
        assert len(compilations) <= allowed


def test_saves_the_sample_or_the_logits():
    logits, saved = draw((64, 32)), []
    for hard in (False, True):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = gumbel_softmax(logits, 0.5, hard)
        known = {y.data_ptr(), logits.data_ptr()}
        assert sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in known) == 8


@both
def test_manual_seed_reproduces_bit_for_bit(backend):
    with implementation(backend):
        draws = []
        for seed in (11, 11, 12):
            torch.manual_seed(seed)
            draws.append(gumbel_softmax(torch.zeros(5, 6, device=DEVICE)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_any_real_number_is_a_temperature():
    logits = torch.randn(5, 6, device=DEVICE)
    expected = gumbel_softmax(logits, 2.0, seed=SEED)
    for tau in (2, np.float32(2), np.float64(2), np.int64(2), np.array(2.0), Fraction(4, 2)):
        assert torch.equal(gumbel_softmax(logits, tau, seed=SEED), expected)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: gumbel_softmax(x, -1.0), ValueError, "tau must be a finite number, 0 or larger, got -1.0"),
        (lambda x: gumbel_softmax(x, math.nan), ValueError, "got nan"),
        (lambda x: gumbel_softmax(x, torch.tensor(-0.5)), ValueError, "got -0.5"),
        (lambda x: gumbel_softmax(x, torch.ones(2)), ValueError, "without dimensions"),
        (lambda x: gumbel_softmax(x, "1"), TypeError, "tau"),
        (lambda x: gumbel_softmax(x, np.ones(2)), TypeError, "got ndarray"),
        (lambda x: gumbel_softmax(x, np.bool_(True)), TypeError, "got bool"),
        (lambda x: gumbel_softmax(x, 1.0, False, 1e-10), TypeError, "eps"),
        (lambda x: gumbel_softmax(x, dim=2), ValueError, "dim=2 is out of range"),
        (lambda x: gumbel_softmax(x, dim=-3), ValueError, "dim"),
        (lambda x: gumbel_softmax(x[:, :0]), ValueError, "at least one class"),
        (lambda x: gumbel_softmax(x[0, 0]), ValueError, "logits must have at least one dimension"),
        (lambda x: gumbel_softmax(x.long()), TypeError, "floating-point"),
        (lambda x: gumbel_softmax(x, seed=2**63), ValueError, "seed"),
    ],
)
def test_errors(call, error, words):
    if words == "got -0.5" and DEVICE == "cuda":
        pytest.skip("a temperature on a GPU is not read back")
    with pytest.raises(error, match=words):
        call(torch.zeros(3, 4, device=DEVICE))


def aot_calls():
    fwd, bwd, seed = launcher("gumbel_softmax.fwd"), launcher("gumbel_softmax.bwd"), torch.zeros((), dtype=torch.int64)
    calls = {}

    def add(name, shape, dtype=torch.float32, dim=1, tensor=False):
        x, tau = torch.empty(shape, dtype=dtype), torch.ones(()) if tensor else None
        calls[f"{name} soft fwd"] = functools.partial(fwd, x, tau, seed, 0.5, False, dim, GUMBEL)
        calls[f"{name} hard bwd"] = functools.partial(bwd, x, None, x, tau, seed, 0.5, True, dim, GUMBEL, tensor)
        if name.startswith("core") or tensor:  # the others: one without the sum, one without the noise
            calls[f"{name} hard fwd"] = functools.partial(fwd, x, tau, seed, 0.5, True, dim, GUMBEL)
            calls[f"{name} soft bwd"] = functools.partial(bwd, x, x, None, tau, seed, 0.5, False, dim, GUMBEL, tensor)

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
