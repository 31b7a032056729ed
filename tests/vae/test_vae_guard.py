"""A bad step changes neither weights nor moments and is counted; too many stop the run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastkl.vae.errors import UserError
from fastkl.vae.guard import Diverged, Guard
from fastkl.vae.parallel import Ranks

from helpers import DEVICE
from vae_helpers import assert_same

NAN, INF = math.nan, math.inf


class Others(Ranks):
    """This process beside another one, which found `bad` of its (loss, gradient)."""

    def __init__(self, *bad: float):
        super().__init__(0, 2)
        object.__setattr__(self, "bad", bad)
        object.__setattr__(self, "exchanges", [])

    def mean(self, values):
        self.exchanges.append(values.shape)
        return (values + values.new_tensor(self.bad)) / 2


def backward(loss: float, gradients: list[float | None], dtype=torch.float32):
    """A model whose loss and gradients are just these."""
    parameters = [nn.Parameter(torch.ones(40, dtype=dtype, device=DEVICE)) for _ in gradients]
    for parameter, value in zip(parameters, gradients):
        if value is not None:
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad[17] = value
    return torch.tensor(loss, device=DEVICE, requires_grad=True), parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_only_what_is_finite_is_admitted(bad, dtype):
    guard = Guard()
    assert guard.admit(*backward(1.0, [1.0, None, -2.0], dtype))
    assert guard.admit(*backward(1.0, [None], dtype))
    assert guard.admit(*backward(1.0, []))
    # The norm of these would be infinite.
    assert guard.admit(*backward(1.0, [torch.finfo(dtype).max] * 3, dtype))
    for gradients in ([bad, 1.0], [None, bad]):
        assert not guard.admit(*backward(1.0, gradients, dtype))
    assert not guard.admit(*backward(bad, [1.0], dtype))
    assert guard.skipped == guard.in_a_row == 3


def test_gradients_of_several_dtypes_and_none_at_all():
    loss, parameters = backward(1.0, [1.0, NAN])
    parameters[0].grad = None
    parameters[0].data = parameters[0].data.half()
    parameters[0].grad = torch.ones_like(parameters[0])
    empty = nn.Parameter(torch.zeros(0, 3, device=DEVICE))
    empty.grad = torch.zeros_like(empty)
    assert not Guard().admit(loss, [*parameters, empty])
    assert Guard().admit(loss, iter([parameters[0], empty]))


def test_a_bad_step_leaves_weights_and_moments_as_they_were():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    guard, x = Guard(), torch.randn(8, 3, device=DEVICE)
    states = []
    for step, factor in enumerate((1.0, 2.0, NAN, INF, 1.0)):
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) * factor).square().mean()
        loss.backward()
        assert guard.admit(loss, model.parameters(), step) == math.isfinite(factor)
        if math.isfinite(factor):
            optimizer.step()
        states.append(copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}))
    for after in states[2:4]:
        assert_same(after, states[1])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(states[4]["model"]["weight"], states[1]["model"]["weight"])
    assert (guard.skipped, guard.in_a_row) == (2, 0)


@pytest.mark.parametrize("written", [False, True])
def test_too_many_in_a_row_stop_the_run(tmp_path, written):
    path = tmp_path / "checkpoint.pt"
    if written:
        path.write_bytes(b"")
    guard = Guard(3, checkpoint=path)
    good, bad = backward(1.0, [1.0]), backward(1.0, [NAN])
    assert [guard.admit(*each) for each in (bad, bad, good, bad, bad)] == [False, False, True, False, False]
    with pytest.raises(
        Diverged, match=r"a gradient was not finite 3 times in a row, the last at step 7: .*learning"
    ) as error:
        guard.admit(*bad, 7)
    assert isinstance(error.value, UserError)
    assert (str(path) in str(error.value)) == written
    assert "\n" not in str(error.value)
    assert guard.skipped == 5
    with pytest.raises(Diverged, match="the loss was not finite once: "):
        Guard(1).admit(*backward(INF, []))


def test_counts_survive_a_checkpoint():
    guard, again = Guard(3), Guard(3)
    for loss in (NAN, 1.0, NAN, NAN):
        guard.admit(*backward(loss, [1.0]))
    again.load_state_dict(guard.state_dict())
    assert (again.skipped, again.in_a_row) == (3, 2)
    with pytest.raises(Diverged):
        again.admit(*backward(NAN, [1.0]))


@pytest.mark.parametrize("bad", [(1.0, 0.0), (0.0, 1.0)])
def test_what_is_bad_on_another_process_is_bad_here(bad):
    guard = Guard(ranks=Others(*bad))
    assert not guard.admit(*backward(1.0, [1.0]))
    fine = Others(0.0, 0.0)
    assert Guard(ranks=fine).admit(*backward(1.0, [1.0]))
    assert fine.exchanges == [(2,)], "one exchange a step"


def test_a_norm_that_overflows_here_is_looked_into_by_all():
    """Otherwise the other process would wait for a collective call that this one does not make."""
    ranks = Others(0.0, 0.0)
    assert Guard(ranks=ranks).admit(*backward(1.0, [3e38]))
    assert len(ranks.exchanges) == 2
    there = Others(0.0, 1.0)
    assert not Guard(ranks=there).admit(*backward(1.0, [1.0]))
    assert len(there.exchanges) == 2


def test_the_device_is_waited_for_once(monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, original=original, n=name: (waits.append(n), original(self))[1]
        )
    assert Guard().admit(*backward(1.0, [1.0, 2.0]))
    assert len(waits) == 1


def test_patience_is_one_or_more():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        Guard(0)
