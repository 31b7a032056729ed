"""A launch is on the device of its tensors, whichever is current; and what the fake driver promises."""

import pytest
import torch

import fastkl

import fake_driver
from fake_driver import DRIVER, LAUNCHES
from launch_helpers import SETTINGS, forward, pair


@pytest.mark.parametrize("name", ["kl_normal", "gmm_log_prob", "mmd"])
def test_tensors_on_another_device_than_the_current_one(name, cuda, replays):
    tensors = {
        "kl_normal": lambda: pair(),
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


def test_a_plan_is_of_one_device(cuda, replays):
    for device in (0, 1, 0, 1, 0, 1, 1, 0):
        cuda(device)
        DRIVER.set_current_device(device)
        forward(pair(), *SETTINGS)
    assert [launch.device for launch in LAUNCHES] == [0, 1, 0, 1, 0, 1, 1, 0]


def test_a_launch_may_be_executed(monkeypatch):
    """By whatever is put there: it gets the PTX, and the parameters that the PTX declares."""
    seen = []
    monkeypatch.setattr(fake_driver, "EXECUTE", lambda *args: seen.append(args))
    mu, logvar = pair()
    kl = forward([mu, logvar], *SETTINGS)
    (compiled, grid, block, shared, parameters), launch = *seen, LAUNCHES[0]
    assert "kl_normal_fwd_kernel" in compiled.asm["ptx"]
    assert (grid, block, shared, parameters) == (launch.grid, launch.block, launch.shared, launch.parameters)
    assert parameters[:3] == [mu.data_ptr(), logvar.data_ptr(), kl.data_ptr()]
    assert block[0] in (32, 64, 128, 256)


def test_a_kernel_of_another_device_is_refused(monkeypatch):
    """So that a launch on the wrong device cannot pass unseen."""
    forward(pair(), *SETTINGS)
    monkeypatch.setattr(DRIVER, "get_current_device", lambda: 0)
    with DRIVER.on(1), pytest.raises(RuntimeError, match="another device"):
        forward(pair(), *SETTINGS)


def test_what_fails_while_executing_fails_the_launch(monkeypatch, capsys):
    monkeypatch.setattr(fake_driver, "EXECUTE", lambda *args: 1 / 0)
    with pytest.raises(RuntimeError, match="Triton Error"):
        forward(pair(), *SETTINGS)
    assert "ZeroDivisionError" in capsys.readouterr().err
