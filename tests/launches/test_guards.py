"""What is not replayed, or not as it was."""

import gc

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastkl
from fastkl.kernels import _launch, kl_normal

from fake_driver import DRIVER, LAUNCHES
from launch_helpers import SETTINGS, forward, launched, pair, ready, replayed_and


def test_a_plan_launches_by_the_compiled_kernel_s_launcher(monkeypatch, replays):
    """As with every version but 3.9, of which one C function suffices."""
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    calls, launcher = [], CudaLauncher.__call__
    monkeypatch.setattr(CudaLauncher, "__call__", lambda *args: (calls.append(args), launcher(*args))[1])
    expected = launched(forward.__wrapped__, pair())
    assert [launched(forward, pair()) for _ in range(4)] == [expected] * 4
    assert (len(replays), len(calls)) == (2, 5)


@pytest.mark.parametrize("version", ["3.3.1", "3.10.0", "4.0"])
def test_an_untried_triton_is_said_once(version, monkeypatch, caplog):
    monkeypatch.setattr(triton, "__version__", version)
    _launch.say_once.cache_clear()
    assert [_launch.replayable() for _ in range(3)] == [False] * 3
    assert [record.name for record in caplog.records] == ["fastkl"]
    assert version in caplog.text


def test_a_triton_that_is_built_differently_is_said_once(replays, caplog):
    """Each launch is the launcher's."""
    _launch.say_once.cache_clear()
    expected = launched(forward.__wrapped__, pair())
    CudaLauncher.__name__ = "Launcher"
    try:
        for n in (6, 7):
            for _ in range(4):
                assert len(forward(pair(n), *SETTINGS)) == n
        assert launched(forward, pair()) == expected
    finally:
        CudaLauncher.__name__ = "CudaLauncher"
    assert replays == []
    assert [record.name for record in caplog.records] == ["fastkl"]


def test_hooks_on_launches_are_called(monkeypatch, replays):
    calls, hooks = [], triton.knobs.runtime.launch_enter_hook
    ready()
    if hooks is None:  # Triton 3.4, in which there is one at most
        monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", calls.append)
    else:
        hooks.add(calls.append)
    try:
        forward(pair(), *SETTINGS)
    finally:
        if hooks is not None:
            hooks.remove(calls.append)
    assert len(calls) == len(LAUNCHES) == 1
    assert replays[1:] == [NotImplemented]


def test_an_emulator_sees_every_launch(monkeypatch, replays):
    ready()
    kernels = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: kernels.append(self))
    forward(pair(), *SETTINGS)
    assert kernels == [kl_normal.kl_normal_fwd_kernel]
    assert len(replays) == 1


def test_the_current_stream_and_device(monkeypatch, replays, cuda):
    ready()
    monkeypatch.setattr(DRIVER, "stream", 7)
    forward(pair(), *SETTINGS)
    DRIVER.set_current_device(1)
    forward(pair(), *SETTINGS)
    assert [(launch.device, launch.stream) for launch in LAUNCHES] == [(0, 7), (1, 7)]
    assert [result is NotImplemented for result in replays] == [False, False, True]


def test_another_driver(monkeypatch, replays):
    ready()
    monkeypatch.setattr(triton.runtime.driver, "_active" if hasattr(driver, "_active") else "active", type(DRIVER)())
    forward(pair(), *SETTINGS)
    assert len(LAUNCHES) == 1
    assert replays[1:] == [NotImplemented]


@pytest.mark.parametrize("where", ["run", "pre_run_hooks"])
def test_a_kernel_that_is_watched_is_not_replayed(where, monkeypatch, replays):
    kernel, seen = kl_normal.kl_normal_fwd_kernel, []

    def watch(*args, **options):
        seen.append(args)

    monkeypatch.setattr(kernel, where, watch if where == "run" else [watch])
    for _ in range(4):
        forward(pair(), *SETTINGS)
    assert (len(seen), replays) == (4, [])


def test_lists_are_told_apart():
    function = _launch.replayed(lambda some, others: [x.sum(0) for x in some] + [x.sum(1) for x in others])
    x = torch.zeros(2, 3)
    with torch.no_grad():
        for _ in range(4):
            for count in range(4):
                shapes = [tensor.shape for tensor in function([x] * count, [x] * (3 - count))]
                assert shapes == [(3,)] * count + [(2,)] * (3 - count)


def test_nothing_to_launch(replays):
    for _ in range(4):
        tensors = [tensor.requires_grad_() for tensor in pair(n=0)]
        gradients = torch.autograd.grad(fastkl.kl_normal(*tensors).sum(), tensors)
        assert [gradient.shape for gradient in gradients] == [(0, 16)] * 2
    assert (len(replays), LAUNCHES) == (4, [])


def test_a_plan_is_short():
    """Allocations and a launch: of views only the addresses are needed, and what is empty needs no zeros."""
    kl_normal.bwd.plans.clear()
    for n in (6, 0):
        for _ in range(2):
            head = torch.zeros(n, 8, 2, requires_grad=True)
            torch.autograd.grad(fastkl.DiagonalNormal.from_packed(head).kl().sum(), head)
    assert [len(plan.steps) for plan in forward.plans.values()] == [2, 1]
    assert [len(plan.steps) for plan in kl_normal.bwd.plans.values()] == [2, 1]


def test_debugging_compiles_anew(monkeypatch):
    expected = launched(forward, pair())[0]
    ready()
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    launch = launched(forward, pair())[0]
    assert launch.code != expected.code
    assert launch.parameters == expected.parameters


@pytest.mark.parametrize(
    "after",
    [
        lambda tensors, kl: kl if kl.numel() and tensors[0].sum().item() == 0 else kl + 1,
        lambda tensors, kl: tensors[0],
        lambda tensors, kl: tensors[0][:2],
        lambda tensors, kl: tensors[0].nonzero(),
        lambda tensors, kl: torch.ops.aten._unsafe_view(tensors[0], tensors[0].shape),
        lambda tensors, kl: [kl, [kl]],
        lambda tensors, kl: torch.cat([kl, kl]),
        lambda tensors, kl: NotImplemented,
    ],
    ids=["reads", "gives an input back", "or a view", "selects", "hides a view", "nests", "lists", "declines"],
)
def test_what_cannot_be_replayed_is_not(after, replays):
    function = replayed_and(after)
    for _ in range(4):
        function(pair())
    assert len(LAUNCHES) == 4
    assert replays == []


def test_torch_ops_are_replayed(replays):
    """On this call's tensors, in place or not, and only if something needs them."""

    def after(tensors, kl):
        total = tensors[0].sum(1)
        total[1:].add_(tensors[1][1:, 0])
        torch.zeros(3).add_(1)
        return [total, None, tensors[1].double().clone()]

    function = replayed_and(after)
    for seed in range(5):
        tensors = pair()
        for tensor in tensors:
            tensor.normal_(generator=torch.Generator().manual_seed(seed))
        with torch.set_grad_enabled(seed == 4):
            for actual, expected in zip(function(tensors), after(tensors, None)):
                assert (actual is None) == (expected is None)
                assert actual is None or torch.equal(actual, expected)
    # Where they could be differentiated the launcher itself runs.
    assert [result is NotImplemented for result in replays] == [False, False, True]


@pytest.mark.parametrize("calls", [False, True])
def test_a_plan_keeps_no_tensor(calls):
    tensors, counts = pair(), []
    function = replayed_and(lambda tensors, kl: tensors[0].sum(1) if calls else kl)
    gc.freeze()  # what was made before is neither looked through nor counted
    for _ in range(4):
        function(tensors)
        gc.collect()
        counts.append(sum(type(item) is torch.Tensor for item in gc.get_objects()))
    gc.unfreeze()
    assert counts[0] == counts[-1]


def test_the_number_of_plans_is_bounded(monkeypatch, replays):
    """A plan in use is not forgotten, however many others come and go."""
    monkeypatch.setattr(_launch, "KEYS", 4)
    monkeypatch.setattr(kl_normal, "launch", lambda *args, **options: None)
    ready()
    for n in range(10, 60):
        forward(pair(n), *SETTINGS)
        forward(pair(), *SETTINGS)
        assert len(forward.plans) + len(forward.older) <= 8
    assert len(replays) == 1 + 50


def test_memory_that_is_not_aligned_is_not_used(monkeypatch, replays):
    """As an allocator of the user's own may give."""
    calls = []

    def misaligned(size, stride, **options):
        calls.append(size)
        return torch.empty(17, **options)[1 : 1 + size[0]]

    monkeypatch.setattr(torch, "empty_strided", misaligned)
    ready()
    assert calls
    assert replays == [NotImplemented]
