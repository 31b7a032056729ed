"""Launches replayed: run by test_host_path.py in a process of its own, with Triton compiled for a driver that only
takes notes."""

import gc

import pytest
import stub_driver
import torch
import triton
from stub_driver import LAUNCHES
from triton.runtime.jit import JITFunction

DRIVER = stub_driver.install()

import test_contract  # noqa: E402

import fastkl  # noqa: E402
from fastkl.kernels import _launch, _plan, kl_normal  # noqa: E402
from fastkl.ops import _register  # noqa: E402

SETTINGS = (-1, [], 1, "logvar", float("-inf"), float("inf"), False)
forward = kl_normal.fwd


@pytest.fixture(autouse=True)
def kernels_for_cpu_tensors(monkeypatch):
    for op, launcher in _register.TRITON.items():
        monkeypatch.setitem(_register.CPU, op, launcher)
    LAUNCHES.clear()
    kl_normal.fwd.plans.clear()


@pytest.fixture
def kept(monkeypatch):
    """No memory is used twice, so that an address says which tensor it is."""
    tensors = []

    def keep(allocate):
        def allocate_and_keep(*args, **kwargs):
            tensors.append(allocate(*args, **kwargs))
            return tensors[-1]

        return allocate_and_keep

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, keep(getattr(owner, name)))


@pytest.fixture
def replays(monkeypatch):
    """The results of all replays."""
    results, replay = [], _plan.Plan.replay

    def noted(self, *args):
        results.append(replay(self, *args))
        return results[-1]

    monkeypatch.setattr(_plan.Plan, "replay", noted)
    return results


def labelled(launches, tensors):
    """The launches with addresses as (tensor, offset in its memory), or as the how manieth new one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    known, seen = [(storage.data_ptr(), storage.nbytes(), at) for at, storage in enumerate(storages)], {}

    def label(value):
        if not isinstance(value, int) or value < 1 << 32:
            return value
        for start, size, at in known:
            if start <= value < start + size:
                return at, value - start
        return "new", seen.setdefault(value, len(seen)), value % 16

    return [(at.code, at.grid, at.stream, [label(value) for value in at.parameters]) for at in launches]


REPLAYED = ("kl_normal", "wasserstein2_normal")
OPS = {
    name: function_and_shapes
    for name, function_and_shapes in (test_contract.OPS | test_contract.SHARED).items()
    if name.partition(",")[0] in REPLAYED or name == "kl_normal_per_dim"
}
IMAGE = {"event_ndim": 3}
# name -> (function, tensors of one call, whether all of its launches are replayed)
VIEWS = {
    "strided": (fastkl.kl_normal, lambda: torch.randn(6, 32).chunk(2, 1)),
    "packed": (lambda head: fastkl.DiagonalNormal.from_packed(head).kl(), lambda: [torch.randn(6, 8, 2)]),
    "a row of many": (fastkl.kl_normal, lambda: torch.randn(2, 1, 9999)),
    "expanded": (fastkl.kl_normal, lambda: [torch.randn(5, 16), torch.randn(16).expand(5, 16)]),
    "float64": (fastkl.kl_normal, lambda: torch.randn(2, 5, 16, dtype=torch.float64)),
    "bfloat16": (lambda *t: fastkl.kl_normal(*t, scale="std", bounds=(-9, 9)), lambda: torch.rand(2, 5, 16).bfloat16()),
    "two dtypes": (fastkl.kl_normal, lambda: [torch.randn(5, 16).half(), torch.randn(5, 16)]),
    "16-byte runs missed": (fastkl.kl_normal, lambda: torch.randn(2, 5 * 16 + 1)[:, 1:].view(2, 5, 16)),
    "channels last": (
        lambda *t: fastkl.kl_normal(*t, **IMAGE),
        lambda: [torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last) for _ in range(2)],
    ),
    "more than two dimensions an axis": (
        lambda *t: fastkl.kl_normal(*t, **IMAGE),
        lambda: torch.randn(2, 3, 4, 6, 5)[:, :, ::2, ::2, ::2],
    ),
    "shared by many": (fastkl.kl_normal, lambda: [*torch.randn(2, 200, 16), *torch.randn(2, 16)]),
    "mean of many": (fastkl.kl_normal_per_dim, lambda: torch.randn(2, 200, 16)),
}


def check(function, draws, kept, replays):
    calls = []
    for index, tensors in enumerate(draws):
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        LAUNCHES.clear()
        replays.clear()
        value = function(*inputs)
        there = labelled(LAUNCHES, [*inputs, value])
        LAUNCHES.clear()
        gradients = torch.autograd.grad(value.sum(), inputs)
        back = labelled(LAUNCHES, [*inputs, value, *gradients])
        assert there
        assert back
        assert len(replays) == (2 if index > 1 else 0)
        assert not any(result is NotImplemented for result in replays)
        calls.append((there, back, [(tensor.shape, tensor.stride()) for tensor in gradients]))
    assert all(again == calls[0] for again in calls[1:])


@pytest.mark.parametrize("name", OPS)
def test_a_replay_launches_what_the_launcher_does(name, kept, replays):
    function, shapes = OPS[name]
    draws = [test_contract.draw(*shapes(5), dtype=torch.float32, seed=seed) for seed in range(4)]
    check(function, draws, kept, replays)


@pytest.mark.parametrize("name", VIEWS)
def test_a_replay_of_views(name, kept, replays):
    function, draw = VIEWS[name]
    check(function, [draw() for _ in range(4)], kept, replays)


def pair(n=6, d=16, dtype=torch.float32, offset=0):
    """Two tensors whose first address lies `offset` bytes behind a multiple of 16."""
    memory = torch.zeros(2, n * d + 16, dtype=dtype)
    first = offset // memory.itemsize
    return [row[first : first + n * d].view(n, d) for row in memory]


def launched(function, tensors):
    LAUNCHES.clear()
    result = function(tensors, *SETTINGS)
    return labelled(LAUNCHES, [*tensors, result])


@pytest.mark.parametrize(
    "other",
    [
        pair(dtype=torch.bfloat16),
        pair(dtype=torch.float64),
        [pair()[0], pair(dtype=torch.float16)[0]],
        pair(offset=4),
        pair(offset=8),
        [pair()[0], pair(offset=4)[0]],
        pair(n=1),
        pair(n=7),
        pair(d=1),
        pair(d=17),
        pair(d=32),
        [pair(d=32)[0][:, :16], pair(d=32)[0][:, :16]],
        [pair()[0], pair(n=1)[0].expand(6, 16)],
        [pair(n=16, d=6)[0].T, pair(n=16, d=6)[0].T],
    ],
    ids=lambda tensors: " ".join(f"{t.dtype} {tuple(t.shape)} {t.stride()} {t.data_ptr() % 16}" for t in tensors),
)
def test_another_key_is_another_launch(other, replays):
    """dtypes, alignments, sizes of 1 and divisibility by 16 decide which code runs."""
    ordinary = forward.__wrapped__
    base = [launched(forward, pair()) for _ in range(3)]
    assert len(replays) == 1
    assert [launched(forward, other) for _ in range(4)] == [launched(ordinary, other)] * 4 != [base[0]] * 4
    assert len(replays) == 3
    assert launched(forward, pair()) == base[0] == launched(ordinary, pair())


def test_one_tensor_given_twice_is_two():
    x = pair()[0]
    for _ in range(3):
        twice = launched(forward, [x, x])
    assert [pointer[0] for pointer in twice[0][3][:2]] == [0, 0] or twice[0][3][0] == twice[0][3][1]
    assert launched(forward, pair()) == launched(forward.__wrapped__, pair())


def test_settings_are_part_of_the_key(replays):
    tensors = pair()
    for settings in ((-1, [], 2, *SETTINGS[3:]), (-1, [], 1, "std", *SETTINGS[4:]), (*SETTINGS[:4], -9.0, 9.0, True)):
        calls = []
        for function in [forward] * 4 + [forward.__wrapped__]:
            LAUNCHES.clear()
            calls.append((function(tensors, *settings).shape, LAUNCHES[0].code, LAUNCHES[0].parameters[2:-1]))
        assert all(call[:2] == calls[0][:2] for call in calls)
    assert len(replays) == 6


def ready():
    for _ in range(3):
        forward(pair(), *SETTINGS)
    LAUNCHES.clear()


def test_another_version_goes_through_its_launcher(monkeypatch, replays):
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    calls, launcher = [], stub_driver.nvidia.CudaLauncher.__call__
    monkeypatch.setattr(
        stub_driver.nvidia.CudaLauncher, "__call__", lambda *args: (calls.append(args), launcher(*args))[1]
    )
    expected = launched(forward.__wrapped__, pair())
    assert [launched(forward, pair()) for _ in range(4)] == [expected] * 4
    assert (len(replays), len(calls)) == (2, 5)


def test_hooks_on_launches_are_called(replays):
    calls, hooks = [], triton.knobs.runtime.launch_enter_hook
    ready()
    hooks.add(calls.append)
    try:
        forward(pair(), *SETTINGS)
    finally:
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


def test_the_current_stream_and_device(monkeypatch, replays):
    ready()
    monkeypatch.setattr(DRIVER, "stream", 7)
    forward(pair(), *SETTINGS)
    monkeypatch.setattr(DRIVER, "device", 1)
    forward(pair(), *SETTINGS)
    assert [launch.stream for launch in LAUNCHES] == [7, 7]
    assert [result is NotImplemented for result in replays] == [False, False, True]


def test_debugging_compiles_anew(monkeypatch):
    ready()
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    forward(pair(), *SETTINGS)
    assert "debug=True" in LAUNCHES[0].code


def scratch_kernel_call(after):
    """A launcher that does `after` to what forward makes."""
    return _launch.replayed(lambda tensors: after(tensors, forward.__wrapped__(tensors, *SETTINGS)))


@pytest.mark.parametrize(
    "after",
    [
        lambda tensors, kl: kl if kl.numel() and tensors[0].sum().item() == 0 else kl + 1,
        lambda tensors, kl: tensors[0],
        lambda tensors, kl: tensors[0][:2],
        lambda tensors, kl: tensors[0][tensors[0] == 0],
        lambda tensors, kl: [kl, [kl]],
        lambda tensors, kl: torch.cat([kl, kl]),
        lambda tensors, kl: NotImplemented,
    ],
    ids=["reads", "gives an input back", "or a view", "selects", "nests", "lists", "declines"],
)
def test_what_cannot_be_replayed_is_not(after, replays):
    function = scratch_kernel_call(after)
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

    function = scratch_kernel_call(after)
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


def test_a_plan_keeps_no_tensor():
    tensors = pair()
    counts = []
    for _ in range(4):
        forward(tensors, *SETTINGS)
        gc.collect()
        counts.append(sum(type(item) is torch.Tensor for item in gc.get_objects()))
    assert counts[0] == counts[-1]


def test_the_number_of_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(_launch, "KEYS", 4)
    for n in range(1, 20):
        forward(pair(n), *SETTINGS)
        assert len(forward.plans) <= 4


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
