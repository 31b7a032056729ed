"""A launch by a plan is what Triton itself would launch: the same code, grid and parameters."""

import pytest
import test_contract
import torch
import triton

import fastkl
from fastkl.kernels import _launch
from fastkl.kernels.normal import kl_normal

from fake_driver import LAUNCHES

# Each compiles for a second or two: one of each kind of argument, gradient and sum.
OPS = (
    "kl_normal, full prior",
    "kl_normal, packed",
    "kl_normal_per_dim",
    "wasserstein2_normal, shared prior",
    "rsample_normal, samples",
    "rsample_kl, shared prior",
    "bernoulli_log_prob",
    "normal_log_prob",
    "gumbel_softmax, tau",
)
IMAGE = {"event_ndim": 3}
# name -> (function, tensors of a call)
VIEWS = {
    "two dtypes": (fastkl.kl_normal, lambda: [torch.randn(5, 16).half(), torch.randn(5, 16)]),
    "more than two dimensions an axis": (
        lambda *t: fastkl.kl_normal(*t, **IMAGE),
        lambda: torch.randn(2, 3, 4, 6, 5)[:, :, ::2, ::2, ::2],
    ),
    "only the KL": (lambda *t: fastkl.rsample_kl(*t)[1], lambda: torch.randn(2, 5, 9999)),
    "sigma of a row": (
        lambda x, mean, logvar: fastkl.normal_log_prob(x, mean, logvar, event_ndim=1),
        lambda: [*torch.randn(2, 5, 8000), torch.randn(5, 1)],
    ),
    "many classes": (lambda x: fastkl.gumbel_softmax(x, 0.5), lambda: [torch.randn(2, 40000)]),
}


def by_triton(self, *first):
    """Plan.launch without what it keeps."""
    if 0 not in self.grid:
        _launch.launch(self.kernel, self.grid, *first, *self.rest, **self.options)


def labelled(tensors):
    """The launches, with (which tensor, offset in its memory) for its addresses, and "new" for all others."""
    places = [(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) for tensor in tensors]

    def label(value):
        if not isinstance(value, int) or value < 1 << 32:
            return value
        known = [(at, value - start) for at, (start, size) in enumerate(places) if start <= value < start + size]
        return known[0] if known else "new"

    return [launch._replace(parameters=[label(value) for value in launch.parameters]) for launch in LAUNCHES]


def launches_of(function, tensors):
    """Of a step, forward and backward."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    LAUNCHES.clear()
    value = function(*inputs)
    torch.autograd.grad(value.sum(), inputs)
    return labelled(inputs)


def check(function, draw, monkeypatch):
    kept = [launches_of(function, draw()) for _ in range(3)]
    assert len(kept[0]) >= 2
    with monkeypatch.context() as patch:
        patch.setattr(_launch.Plan, "launch", by_triton)
        expected = launches_of(function, draw())
    assert kept == [expected] * 3


@pytest.mark.parametrize("name", OPS)
def test_a_plan_launches_what_triton_would(name, monkeypatch):
    function, shapes = test_contract.get(name)
    check(function, lambda: test_contract.draw(*shapes(5), dtype=torch.float32, seed=0), monkeypatch)


@pytest.mark.parametrize("name", VIEWS)
def test_plans_of_views(name, monkeypatch):
    check(*VIEWS[name], monkeypatch)


def pair(n=6, d=64, dtype=torch.float32, offset=0):
    """Two tensors whose first address lies `offset` bytes behind a multiple of 16."""
    memory = torch.zeros(2, n * d + 16, dtype=dtype)
    first = offset // memory.itemsize
    return [row[first : first + n * d].view(n, d) for row in memory]


@pytest.mark.parametrize(
    "other",
    [
        pair(dtype=torch.bfloat16),
        [pair()[0], pair(dtype=torch.float16)[0]],
        pair(offset=4),
        pair(offset=8),
        [pair()[0], pair(offset=4)[0]],
        pair(n=1),
        pair(n=7),
        pair(d=65),
        [pair(d=128)[0][:, :64], pair(d=128)[0][:, :64]],
        [pair()[0], pair(n=1)[0].expand(6, 64)],
        [pair(n=64, d=6)[0].T, pair(n=64, d=6)[0].T],
    ],
    ids=lambda tensors: " ".join(f"{t.dtype} {tuple(t.shape)} {t.stride()} {t.data_ptr() % 16}" for t in tensors),
)
def test_other_tensors_are_another_launch(other, monkeypatch):
    """dtypes, alignments, sizes of 1 and divisibility by 16 decide which code runs."""

    def launches(tensors):
        LAUNCHES.clear()
        kl_normal.fwd(*tensors, None, None, 1, "logvar", float("-inf"), float("inf"), False)
        return labelled(tensors)

    base = [launches(pair()) for _ in range(2)]
    found = [launches(other) for _ in range(3)]
    assert launches(pair()) == base[0] == base[1]
    assert found[0][0].code != base[0][0].code or found[0][0].parameters[3:] != base[0][0].parameters[3:]
    monkeypatch.setattr(_launch.Plan, "launch", by_triton)
    assert found == [launches(other)] * 3


def test_two_distances_of_the_same_tensors_are_two_kernels():
    """Their kernel is one, and so are its arguments; the terms that it sums differ."""
    mu, logvar = pair()
    for _ in range(2):
        LAUNCHES.clear()
        for distance in (fastkl.kl_normal, fastkl.wasserstein2_normal):
            inputs = [mu.requires_grad_(), logvar.requires_grad_()]
            torch.autograd.grad(distance(*inputs).sum(), inputs)
        assert len({launch.code for launch in LAUNCHES}) == len(LAUNCHES) == 4


def test_hooks_on_launches_are_called(monkeypatch):
    """Those of a profiler, of launches by a plan too."""
    calls, hooks = [], triton.knobs.runtime.launch_enter_hook
    mu, logvar = pair()
    fastkl.kl_normal(mu, logvar)
    if hooks is None:  # Triton 3.4, in which there is one at most
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", calls.append)
    else:
        hooks.add(calls.append)
    try:
        fastkl.kl_normal(mu, logvar)
    finally:
        if hooks is not None:
            hooks.remove(calls.append)
    assert len(calls) == 1


def test_an_empty_batch_launches_nothing():
    for _ in range(2):
        inputs = [tensor.requires_grad_() for tensor in pair(n=0)]
        gradients = torch.autograd.grad(fastkl.kl_normal(*inputs).sum(), inputs)
        assert [gradient.shape for gradient in gradients] == [(0, 64)] * 2
    assert LAUNCHES == []
