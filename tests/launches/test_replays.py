"""A replay launches what the launcher does: the same code, grid and parameters."""

import pytest
import test_contract
import torch

import fastkl
from fastkl.kernels import _launch, gumbel_softmax

from fake_driver import LAUNCHES
from launch_helpers import SETTINGS, forward, labelled, launched, pair

# Each compiles for a second or two: one of each kind of argument, gradient and sum.
OPS = (
    "kl_normal, full prior",
    "kl_normal, packed",
    "kl_normal_per_dim",
    "wasserstein2_normal, shared prior",
    "rsample_normal, samples",
    "rsample_kl, prior, own noise",
    "rsample_kl, shared prior",
    "bernoulli_log_prob",
    "normal_log_prob",
    "gumbel_softmax",
    "gumbel_softmax, tau",
)
IMAGE = {"event_ndim": 3}


def likelihood(x, mean, logvar):
    return fastkl.normal_log_prob(x, mean, logvar, event_ndim=1)


# name -> (function, tensors of a call)
VIEWS = {
    "strided": (fastkl.kl_normal, lambda: torch.randn(6, 32).chunk(2, 1)),
    "packed": (lambda head: fastkl.DiagonalNormal.from_packed(head).kl(), lambda: [torch.randn(6, 8, 2)]),
    "expanded": (fastkl.kl_normal, lambda: [torch.randn(5, 16), torch.randn(16).expand(5, 16)]),
    "bfloat16": (lambda *t: fastkl.kl_normal(*t, scale="std", bounds=(-9, 9)), lambda: torch.rand(2, 5, 16).bfloat16()),
    "two dtypes": (fastkl.kl_normal, lambda: [torch.randn(5, 16).half(), torch.randn(5, 16)]),
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
    "only the KL": (lambda *t: fastkl.rsample_kl(*t)[1], lambda: torch.randn(2, 5, 9999)),
    "sigma of a row": (likelihood, lambda: [*torch.randn(2, 5, 8000), torch.randn(5, 1)]),
    "many classes": (lambda x: fastkl.gumbel_softmax(x, 0.5), lambda: [torch.randn(2, 40000)]),
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
    function, shapes = test_contract.get(name)
    draws = [test_contract.draw(*shapes(5), dtype=torch.float32, seed=seed) for seed in range(4)]
    check(function, draws, kept, replays)


@pytest.mark.parametrize("name", VIEWS)
def test_a_replay_of_views(name, kept, replays):
    function, draw = VIEWS[name]
    check(function, [draw() for _ in range(4)], kept, replays)


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
    assert twice[0].parameters[0] == twice[0].parameters[1]
    assert launched(forward, pair()) == launched(forward.__wrapped__, pair())


def test_a_temperature_is_not_part_of_a_key(monkeypatch, replays):
    """A step of training with another tau each time: its plan stays, and so do all others."""
    monkeypatch.setattr(_launch, "KEYS", 16)
    launchers = gumbel_softmax.launch_fwd, gumbel_softmax.launch_bwd
    for launcher in launchers:
        launcher.plans.clear()
    logits, temperatures, used = torch.randn(6, 16, requires_grad=True), [2.0 / (1 + at) for at in range(2000)], []
    for tau in temperatures:
        LAUNCHES.clear()
        fastkl.gumbel_softmax(logits, tau).sum().backward()
        used += [LAUNCHES[0].parameters[2], LAUNCHES[1].parameters[3]]
        fastkl.kl_normal(*pair())
    expected = torch.tensor(temperatures, dtype=torch.float64).repeat_interleave(2)
    torch.testing.assert_close(torch.tensor(used, dtype=torch.float64), 1 / expected, rtol=1e-7, atol=0)
    assert [len(launcher.plans) for launcher in launchers] == [1, 1]
    assert len(replays) == 3 * (2000 - 2)
    assert NotImplemented not in replays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_of_0_is_another_launch(dtype):
    """It has other code, and before and after it the ordinary one; in float64 the number comes in a tensor."""
    logits = torch.randn(6, 16, dtype=dtype)
    calls = []
    for tau in [0.5, 0.0] * 4:
        LAUNCHES.clear()
        y = fastkl.gumbel_softmax(logits, tau, seed=torch.tensor(1))
        calls.append([(launch.code, launch.parameters[5:]) for launch in labelled(LAUNCHES, [logits, y])])
    assert calls == [calls[0], calls[1]] * 4
    assert calls[0] != calls[1]


def test_settings_are_part_of_the_key(replays):
    tensors = pair()
    for settings in ((-1, [], 2, *SETTINGS[3:]), (-1, [], 1, "std", *SETTINGS[4:]), (*SETTINGS[:4], -9.0, 9.0, True)):
        calls = []
        for function in [forward] * 4 + [forward.__wrapped__]:
            LAUNCHES.clear()
            calls.append((function(tensors, *settings).shape, LAUNCHES[0].code, LAUNCHES[0].parameters[2:-1]))
        assert all(call[:2] == calls[0][:2] for call in calls)
    assert len(replays) == 6
