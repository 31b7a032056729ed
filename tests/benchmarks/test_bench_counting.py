"""What the benchmark counts, against examples counted by hand."""

import importlib

import pytest
import torch

from bench import bench_kl_normal, bench_rsample_kl, counting
from bench.case import as_list, definition, disagreement, make_cotangents, normal_noise, problem

N, D = 64, 128
UNIT = 4 * N * D


def count(function, *shapes):
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    cotangents = make_cotangents(as_list(function(*inputs)), inputs)
    forward, backward = counting.count_eager(
        lambda: function(*inputs), lambda outputs: torch.autograd.grad(as_list(outputs), inputs, cotangents)
    )
    return forward, backward, counting.saved_bytes(function, inputs) / UNIT


@pytest.mark.parametrize(
    ("function", "shapes", "units", "launches", "saved"),
    [
        (bench_kl_normal.formula, [(N, D)] * 2, 25, (8, 8), 1),
        (bench_kl_normal.formula_head, [(N, 2 * D)], 29, (8, 9), 1),
        (bench_kl_normal.formula_prior, [(N, D)] * 4, 60, (14, 16), 4),
        (bench_rsample_kl.formula, [(N, D)] * 2, 50, (13, 13), 3),
    ],
    ids=["KL", "packed head", "two Gaussians", "sample + KL"],
)
def test_eager_traffic_and_launches(function, shapes, units, launches, saved):
    forward, backward, kept = count(function, *shapes)
    # Beside whole tensors: one value per row, a few times over.
    assert units <= (forward.bytes + backward.bytes) / UNIT <= units + 16 / D
    assert (forward.launches, backward.launches, kept) == (*launches, saved)


@pytest.mark.parametrize(
    ("step", "read", "written", "launches"),
    [
        (lambda x: x + 1, 1, 1, 1),
        (lambda x: x.t().reshape(2, -1), 1, 1, 1),  # a copy, behind a view that costs nothing
        (lambda x: x.view(-1)[: N * D // 2].exp(), 0.5, 0.5, 1),
        (lambda x: x[:1].expand(N, D) * x, 1 + 1 / N, 1, 1),
        (lambda x: torch.randn_like(x), 0, 1, 1),
        (lambda x: torch.empty_like(x), 0, 0, 0),
        (lambda x: torch.empty_like(x).copy_(x), 1, 1, 1),
        (lambda x: x.add_(x), 2, 1, 1),
        (lambda x: x.zero_(), 0, 1, 1),
        (lambda x: x[:0] + 1, 0, 0, 0),
        (lambda x: torch.zeros(N, D), 0, 1, 1),
    ],
)
def test_one_op(step, read, written, launches):
    x = torch.randn(N, D)
    with counting.Counter() as counter:
        step(x)
    assert counter.traffic == (pytest.approx(read * UNIT), pytest.approx(written * UNIT), launches)


def test_peak_and_kept_memory():
    x = torch.randn(N, D)
    assert counting.peak_bytes(lambda: x.exp().exp(), "cpu") == 2 * UNIT
    assert counting.peak_bytes(lambda: [x.exp(), x.exp(), x.exp()], "cpu") == 3 * UNIT
    leaf = x.clone().requires_grad_()
    assert counting.saved_bytes(lambda y: y.exp(), [leaf]) == UNIT  # its output
    assert counting.saved_bytes(lambda y: y * y, [leaf]) == 0  # its input
    case = bench_rsample_kl.plain("cpu", N, D)
    assert counting.saved_bytes(case.fastkl, case.inputs) == 8  # the seed


def test_inductor_accounts_for_its_graphs(monkeypatch):
    """The KL in one pass each way: 2 units forward, 4 backward. Its C++ need not be compiled for that."""
    monkeypatch.setattr("torch._inductor.async_compile.AsyncCompile.cpp_pybinding", lambda *code: lambda *tensors: None)
    case = bench_kl_normal.plain("cpu", N, D)
    with counting.inductor_account() as graphs:
        value = torch.compile(case.eager, dynamic=False)(*case.inputs)
        torch.autograd.grad(value, case.inputs)
    forward, backward = (size / UNIT for size in graphs.bytes)
    assert 2 <= forward <= 2 + 4 / D
    assert 4 <= backward <= 4 + 4 / D


def test_what_does_not_match_is_refused():
    for module in ("kl_normal", "rsample_kl", "gumbel_softmax", "sliced_wasserstein"):
        case = next(importlib.import_module(f"bench.bench_{module}").cases("cpu", True))
        cotangents = make_cotangents(as_list(case.eager(*case.inputs)), case.inputs)
        assert not problem(case, "fastkl", case.fastkl, cotangents)
        assert not problem(case, "eager", case.eager, cotangents)
        wrong = case._replace(same_noise={})  # without the noise given, a drawn result cannot match
        value = problem(wrong, "broken", lambda *inputs, f=case.eager: halve(f(*inputs)), cotangents)
        assert value, module


@pytest.mark.parametrize("module", [bench_kl_normal, bench_rsample_kl])
def test_the_definition_by_rows_is_that_of_all_rows(module, monkeypatch):
    """Parts that do not come out even; and a single wrong number in the last of them is seen."""
    monkeypatch.setattr("bench.case.PART", 3 * 16)
    case = module.plain("cpu", 10, 16)
    drawn = as_list(case.eager(*case.inputs))
    cotangents = make_cotangents(drawn, case.inputs)
    noise = normal_noise(case.inputs, drawn) if case.noise else {}
    case = case._replace(noise=(lambda inputs, outputs: given(noise, inputs, outputs)) if noise else None)
    parts, whole = (
        [x for group in definition(one, cotangents, drawn if noise else None) for x in group]
        for one in (case, case._replace(by_rows=False))
    )
    assert len(parts) == len(whole)
    for a, b in zip(parts, whole):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    actual = [[x.clone() for x in parts[:-2]], [x.clone() for x in parts[-2:]]]
    assert not disagreement(actual, (parts[:-2], parts[-2:]), 1e-7)
    actual[1][1][-1, -1] += 0.1
    assert "gradient 1 differs" in disagreement(actual, (parts[:-2], parts[-2:]), 1e-7)
    actual[1][1][-1, -1] = float("nan")
    assert "gradient 1 differs" in disagreement(actual, (parts[:-2], parts[-2:]), 1e-7)


def given(noise, inputs, outputs):
    """That of these rows, found by the sample, with no look at how it is spread: there are too few."""
    eps = (outputs[0] - inputs[0]) / torch.exp(0.5 * inputs[1])
    assert any(torch.allclose(eps[0], row.double(), atol=1e-4) for row in noise["eps"])
    return {"eps": eps.detach()}


def halve(outputs):
    return tuple(0.5 * out for out in outputs) if isinstance(outputs, tuple) else 0.5 * outputs


def test_noise_that_is_not_standard_normal_is_refused():
    case = bench_rsample_kl.plain("cpu", 32, 32)
    cotangents = make_cotangents(as_list(case.eager(*case.inputs)), case.inputs)
    for noise in (torch.zeros_like, lambda x: 1.5 * torch.randn_like(x), lambda x: torch.randn_like(x) + 0.5):

        def sample(mu, logvar, noise=noise):
            return mu + (0.5 * logvar).exp() * noise(mu), bench_kl_normal.formula(mu, logvar)

        assert "standard normal" in problem(case, "broken", sample, cotangents)
    eps = torch.randn(32, 32, dtype=torch.float64)
    mu, logvar = (tensor.double() for tensor in case.inputs)
    torch.testing.assert_close(normal_noise([mu, logvar], [mu + (0.5 * logvar).exp() * eps])["eps"], eps)


def test_only_gradients_are_measured_together():
    """A sample's KL is held to its own digits, however large the sample is."""
    large, small = torch.tensor([1000.0]), torch.tensor([1.0])
    off = small + 1e-3
    rounding = torch.finfo(torch.float32).eps
    exact = ([large, small], [large, small])
    assert not disagreement(([large, small], [large, off]), exact, rounding, together=True)
    assert "gradient 1 differs" in disagreement(([large, small], [large, off]), exact, rounding)
    assert "output 1 differs" in disagreement(([large, off], [large, small]), exact, rounding, together=True)
