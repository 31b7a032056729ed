"""gumbel_softmax: its noise and distribution, temperatures at their limits, excluded classes, arguments."""

import functools
import importlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_gumbel_softmax import GUMBEL, INFINITY, SEED, both, draw, hard_and_soft, run
from torch.autograd import gradcheck, gradgradcheck

from fastkl import reference
from fastkl.ops.categorical.gumbel_softmax import gumbel_softmax
from fastkl.reference import categorical

from helpers import DEVICE, Package, implementation, launcher, leaf

stats = Package("scipy.stats")


@pytest.fixture
def many_rows(monkeypatch):
    """Few programs for thousands of short rows: the interpreter's time is by program."""
    monkeypatch.setattr(importlib.import_module("fastkl.kernels.categorical.gumbel_softmax"), "SHORT", 8192)


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
        patch.setattr(categorical, "philox", lambda *_: list(words.long().view(-1, 3)[:, :, None].unbind(1)) * 2)
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
    given, settings = (torch.tensor(tau, device=DEVICE), seed), (1.0, hard, 1, GUMBEL)
    x = torch.zeros(3, 4, device=DEVICE)
    assert launcher("gumbel_softmax.fwd")(x, *given, *settings).isnan().all()
    y_and_logits = (None, x) if hard else (x + 0.25, None)
    dlogits = torch.zeros_like(x)
    launcher("gumbel_softmax.bwd")(x + 1, *y_and_logits, *given, dlogits, None, *settings)
    assert dlogits.isnan().all()


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
