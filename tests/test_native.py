"""The native CPU path: it agrees with the definition, and does not depend on threads or layout."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkl
from fastkl import reference
from fastkl.native import _build, _pack
from fastkl.ops import _call

from helpers import DEVICE, implementation

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
]


def everything(shape, dtype=torch.float32, event_ndim=1):
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    prior = [torch.randn(shape[-event_ndim:], generator=generator, dtype=dtype).requires_grad_() for _ in range(2)]
    z, kl = fastkl.rsample_kl(mu, logvar, *prior, event_ndim=event_ndim, seed=3)
    per_dim = fastkl.kl_normal_per_dim(mu, logvar, event_ndim=event_ndim)
    value = kl + fastkl.kl_normal(mu, logvar, event_ndim=event_ndim)
    total = value.sum() + z.square().sum() + per_dim.square().sum()
    return [z, value, per_dim, *torch.autograd.grad(total, [mu, logvar, *prior])]


# Many short rows; rows of more than a tile and more than a piece of work; one long row; one column.
@pytest.mark.parametrize("shape", [(9000, 5), (20, 3000), (2, 30_000), (1, 70_001), (40_000, 1)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(shape))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    with implementation("torch"):
        for actual, expected in zip(results[0], everything(shape)):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_stays_visible(dtype):
    """As in the definition, element by element; underflow is neither slow nor NaN."""
    special = [float("nan"), float("inf"), float("-inf"), 200.0, 800.0, -90.0, -104.0, -200.0, -1e4, 1e-30, 0.0]
    logvar = torch.tensor(special, dtype=dtype)[:, None].requires_grad_()
    mu = torch.full_like(logvar, 0.5).requires_grad_()
    eps = torch.ones_like(mu.detach())
    z, kl = fastkl.rsample_kl(mu, logvar, eps=eps)
    gradients = torch.autograd.grad([z, kl], [mu, logvar], [eps, torch.ones_like(kl)])
    exact = [t.detach().requires_grad_() for t in (mu, logvar)]
    wanted = list(reference.rsample_kl(*exact, eps=eps))
    wanted += torch.autograd.grad(wanted, exact, [eps, torch.ones_like(kl)])
    for actual, expected in zip([z, kl, *gradients], wanted):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_sigma_keeps_its_digits(dtype):
    """In a sample and its gradient with mean 0: sigma must not be computed as 1 + (sigma - 1)."""
    logvar = torch.linspace(-160, 160, 641, dtype=dtype)[:, None].requires_grad_()
    mu, ones = torch.zeros_like(logvar), torch.ones_like(logvar)
    z, kl = fastkl.rsample_kl(mu, logvar, eps=ones)
    gradient = torch.autograd.grad([z, kl], logvar, [ones, torch.zeros_like(kl)])[0]
    sigma = logvar.detach().double().mul(0.5).exp()
    rtol = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(z.detach().double(), sigma, rtol=rtol, atol=0)
    # Times the KL's own gradient, of which nothing was asked: 0 times what is up to e^160.
    inside = (logvar.abs() < 85).flatten()
    torch.testing.assert_close(gradient.double()[inside], 0.5 * sigma[inside], rtol=rtol, atol=0)


@pytest.mark.parametrize("scale", ["logvar", "log_std", "std", "softplus"])
def test_every_scale_shows_what_is_not_finite(scale):
    special = [float("nan"), float("inf"), float("-inf"), 0.0, 1.0]
    parameter = torch.tensor(special)[:, None].requires_grad_()
    mu = torch.full_like(parameter, 0.5).requires_grad_()
    results = []
    for name in ("native", "torch"):
        with implementation(name):
            kl = fastkl.kl_normal(mu, parameter, scale=scale, bounds=(-5.0, 5.0))
            value = torch.stack([kl, fastkl.wasserstein2_normal(mu, parameter, scale=scale)])
            results.append([value, *torch.autograd.grad(kl.sum(), [mu, parameter])])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_the_loop_gives_way_to_modes_and_to_second_derivatives():
    mu, logvar = (torch.randn(6, 5, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
    value = fastkl.kl_normal(mu, logvar)
    (first,) = torch.autograd.grad(value.sum(), logvar, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logvar)
    torch.testing.assert_close(second, 0.5 * logvar.exp())
    with Record() as record:  # a dispatch mode listens
        again = fastkl.kl_normal(mu, logvar)
    assert record.ops == ["fastkl::kl_normal_fwd"]
    assert torch.equal(again, value)


class Record(TorchDispatchMode):
    def __enter__(self):
        self.ops = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op.name())
        return op(*args, **(kwargs or {}))


def calls_of(function) -> tuple[list[str], object]:
    """The Python functions of fastkl that are entered, as "file:function", and what `function` returns."""
    names, folder = [], Path(fastkl.__file__).parent

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(folder):
            names.append(f"{path.relative_to(folder)}:{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        return names, function()
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("op", ["kl_normal", "wasserstein2_normal", "kl_normal_per_dim"])
def test_a_small_call_takes_few_steps(op):
    """A small latent is bound by the host: with 22 calls forward kl_normal was slower than the eager formula."""
    mu, logvar = (torch.randn(32, 8).requires_grad_() for _ in range(2))
    getattr(fastkl, op)(mu, logvar).sum().backward()
    forward, value = calls_of(lambda: getattr(fastkl, op)(mu, logvar))
    backward, _ = calls_of(value.sum().backward)
    for calls in (forward, backward):
        assert len(calls) <= 8, calls
        assert len({call.partition(":")[0] for call in calls}) <= 4, calls


@pytest.mark.parametrize("columns", [300, 1000, 5000, 50_000])
def test_equal_terms_add_up(columns):
    """In a sequential sum, every step would round in the same direction."""
    mu, logvar = torch.full((2, columns), -5.3), torch.full((2, columns), -6.2333)
    for function in (lambda m, v: fastkl.normal_log_prob(m, m, v), fastkl.kl_normal, fastkl.wasserstein2_normal):
        exact = function(mu.double(), logvar.double())
        torch.testing.assert_close(function(mu, logvar).double(), exact, rtol=6e-7, atol=0)


def test_a_plan_is_made_once_for_a_shape_and_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(_pack, "MOST_PLANS", 4)
    _pack.plans.clear()
    for _ in range(3):
        for columns in range(1, 7):
            mu = torch.ones(2, columns)
            kl = fastkl.kl_normal(mu, mu, bounds=(-1.0, 1.0))
            torch.testing.assert_close(kl, torch.full((2,), columns * 0.5 * 1.7182818))
    assert 1 <= len(_pack.plans) <= 4
    assert set(_call.NATIVE) < set(_call.CPU)


def test_sources_have_no_warnings():
    """With -Wall and -Wextra."""
    for source in sorted(_build.SOURCES.glob("*.c")):
        for options in ((), ("-DFLOAT64",)):
            flags = [flag for flag in _build.FLAGS if flag not in ("-w", "-O3")]
            flags += ["-Wno-unused-function"]  # a header has more than each source needs
            command = [
                *_build._compiler(),
                *flags,
                *options,
                "-Wall",
                "-Wextra",
                "-O1",
                "-c",
                str(source),
                "-o",
                os.devnull,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stderr, done.stderr


def test_large_results_ask_for_large_pages():
    """The system's own record of the mapping says so."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        pytest.skip("no transparent large pages here")
    if "[madvise]" not in setting:
        pytest.skip("the system decides alone")

    def flags(tensor: torch.Tensor) -> list[str]:
        middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = start <= middle < end
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
        raise AssertionError("not mapped")

    head = torch.zeros(2048, 8192).requires_grad_()
    z, kl = fastkl.DiagonalNormal.from_packed(head, dim=1).rsample_kl()
    gradient = torch.autograd.grad([z, kl], head, [torch.ones_like(z), torch.ones_like(kl)])[0]
    assert "hg" in flags(z)
    assert "hg" in flags(gradient)
    if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":  # torch asks for them itself
        assert "hg" not in flags(torch.zeros(2048, 8192))
    small = fastkl.rsample_normal(torch.zeros(2047, 4096), torch.zeros(2047, 4096))  # malloc may have it at hand
    assert "hg" not in flags(small)


def test_the_compiler_gets_the_closed_form_of_the_kl_on_a_cpu():
    """It fuses that with its neighbours; a call of an op costs more than a small latent's arithmetic."""
    found, (mu, logvar) = [], torch.randn(2, 6, 5, device="cpu")

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        value = torch.compile(fastkl.kl_normal, backend=backend, fullgraph=True)(mu, logvar)
    assert len(found) > 3
    assert not any("fastkl" in name for name in found)
    torch.testing.assert_close(value, fastkl.kl_normal(mu, logvar))
