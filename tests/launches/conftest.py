"""These tests run in a process of their own, with the plugin fake_driver: test_host_path.py starts it."""

import pytest
import torch

import fake_driver

collect_ignore_glob = [] if fake_driver.DRIVER else ["test_*.py"]


@pytest.fixture(autouse=True)
def kernels_for_cpu_tensors(monkeypatch):
    from fastkl.ops import _call

    for op, launcher in _call.TRITON.items():
        monkeypatch.setitem(_call.CPU, op, launcher)
    fake_driver.LAUNCHES.clear()


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda's current device is the fake driver's; cuda(n) says that all tensors are on cuda:n."""
    from fastkl.kernels import _launch

    monkeypatch.setattr(torch.cuda, "current_device", lambda: fake_driver.DRIVER.get_current_device())
    monkeypatch.setattr(torch.cuda, "device", lambda device: fake_driver.DRIVER.on(torch.device(device).index))
    yield lambda n: monkeypatch.setattr(_launch, "device_of", lambda args: torch.device("cuda", n))
    fake_driver.DRIVER.set_current_device(0)
