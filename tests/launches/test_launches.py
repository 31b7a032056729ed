"""Launches by Triton's own launcher, on the device of their tensors; and what the fake driver promises."""

import pytest
import torch

import fastkl
from fastkl.kernels import _launch
from fastkl.kernels.normal import kl_normal

import fake_driver
from fake_driver import DRIVER, LAUNCHES

# A launcher and its settings.
forward = kl_normal.fwd
SETTINGS = (None, None, 1, "logvar", float("-inf"), float("inf"), False)


def pair():
    return list(torch.zeros(2, 6, 16))


@pytest.mark.parametrize("name", ["kl_normal", "gmm_log_prob", "mmd"])
def test_tensors_on_another_device_than_the_current_one(name, cuda):
    tensors = {
        "kl_normal": pair,
        "gmm_log_prob": lambda: [torch.randn(6, 4), torch.zeros(3), torch.randn(3, 4), torch.zeros(3, 4)],
        "mmd": lambda: [torch.randn(6, 4), torch.randn(5, 4)],
    }[name]
    for device in (1, 0, 2):
        cuda(device)
        LAUNCHES.clear()
        for _ in range(3):
            getattr(fastkl, name)(*tensors())
        assert LAUNCHES
        assert {launch.device for launch in LAUNCHES} == {device}
        assert DRIVER.get_current_device() == 0


def test_the_current_device_and_stream(monkeypatch, cuda):
    monkeypatch.setattr(DRIVER, "stream", 7)
    for device in (0, 1, 0, 1, 0, 1, 1, 0):
        cuda(device)
        DRIVER.set_current_device(device)
        forward(*pair(), *SETTINGS)
    assert [launch.device for launch in LAUNCHES] == [0, 1, 0, 1, 0, 1, 1, 0]
    assert {launch.stream for launch in LAUNCHES} == {7}


def test_a_launch_may_be_executed(monkeypatch):
    """By whatever is put there: it gets the PTX, and the parameters that the PTX declares."""
    seen = []
    monkeypatch.setattr(fake_driver, "EXECUTE", lambda *args: seen.append(args))
    mu, logvar = pair()
    kl = forward(mu, logvar, *SETTINGS)
    (compiled, grid, block, shared, parameters), launch = *seen, LAUNCHES[0]
    assert "kl_normal_fwd_kernel" in compiled.asm["ptx"]
    assert (grid, block, shared, parameters) == (launch.grid, launch.block, launch.shared, launch.parameters)
    assert parameters[:3] == [mu.data_ptr(), logvar.data_ptr(), kl.data_ptr()]
    assert block[0] in (32, 64, 128, 256)


def test_a_kernel_of_another_device_is_refused(monkeypatch):
    """So that a launch on the wrong device cannot pass unseen."""
    forward(*pair(), *SETTINGS)
    monkeypatch.setattr(DRIVER, "get_current_device", lambda: 0)
    with DRIVER.on(1), pytest.raises(RuntimeError, match="another device"):
        forward(*pair(), *SETTINGS)


def test_what_fails_while_executing_fails_the_launch(monkeypatch, capsys):
    monkeypatch.setattr(fake_driver, "EXECUTE", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="Triton Error"):
        forward(*pair(), *SETTINGS)
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_that_changes_compiles_nothing(dtype, monkeypatch):
    """A number is a parameter of the same code (in float64 it comes in a tensor), and 0 has code of its own. Triton is
    asked for each of the two once."""
    asked, launch = [], _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda *args, **options: (asked.append(args), launch(*args, **options))[1])
    logits = torch.randn(6, 16, dtype=dtype)
    temperatures = [2.0, 0.5, 0.0, 1.0, 0.1, 0.0]
    for tau in temperatures:
        fastkl.gumbel_softmax(logits, tau, seed=torch.tensor(1))
    assert len(LAUNCHES) == len(temperatures)
    assert len(asked) <= 2
    assert len({launch.code for launch, tau in zip(LAUNCHES, temperatures) if tau}) == 1
    assert len({launch.code for launch in LAUNCHES}) == 2
    if dtype == torch.float32:
        passed = [launch.parameters[2] for launch, tau in zip(LAUNCHES, temperatures) if tau]
        assert passed == pytest.approx([1 / tau for tau in temperatures if tau])
