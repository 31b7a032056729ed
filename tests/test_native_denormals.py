"""Ordinary numbers give no denormals inside the C loops, not even in a branch that a compiler computes and drops.

Arithmetic with denormals is up to a hundred times slower. The processor remembers that one was computed.
"""

import ctypes
import ctypes.util
import platform

import pytest
import test_contract
import torch

import fastkl
from fastkl.native import _build, _pack

from helpers import DEVICE

UNDERFLOW = 16  # of fenv.h, on x86

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the flag"),
]


def of_scale(op, scale):
    return lambda *tensors: op(*tensors[:-1], tensors[-1].abs() + 0.5, scale=scale)


def sample(mu, std, *, scale):
    return fastkl.rsample_kl(mu, std, scale=scale, seed=1)[0].sum(-1)


def mixture(z, means, std, *, scale):
    return fastkl.gmm_log_prob(z, std.new_zeros(means.shape[:-1]), means, std, scale=scale)


CASES = test_contract.OPS | test_contract.SHARED
CASES |= {
    f"{name}, {scale}": (of_scale(op, scale), shapes)
    for scale in ("logvar", "log_std", "std", "softplus")
    for name, op, shapes in (
        ("kl_normal", fastkl.kl_normal, lambda n: [(n, 4)] * 2),
        ("wasserstein2_normal", fastkl.wasserstein2_normal, lambda n: [(n, 4)] * 2),
        ("normal_log_prob", fastkl.normal_log_prob, lambda n: [(n, 4)] * 3),
        ("rsample_kl", lambda *t, **s: fastkl.rsample_kl(*t, seed=1, **s)[1], lambda n: [(n, 4)] * 2),
        ("samples", sample, lambda n: [(n, 4)] * 2),
        ("mixture", mixture, lambda n: [(n, 4), (7, 4), (7, 4)]),
        ("mixture for each datum", mixture, lambda n: [(n, 4), (n, 7, 4), (n, 7, 4)]),
    )
}


class Watched:
    """A C function that remembers in `found` whether a call underflowed."""

    def __init__(self, function, found):
        self.function, self.found = function, found
        self.environment = ctypes.CDLL(ctypes.util.find_library("m"))

    def __call__(self, *args):
        self.function.restype, self.function.argtypes = self.restype, self.argtypes
        self.environment.feclearexcept(UNDERFLOW)
        failed = self.function(*args)
        self.found.append(bool(self.environment.fetestexcept(UNDERFLOW)))
        return failed


@pytest.fixture
def found(monkeypatch):
    """For each call of a C function whether it underflowed."""
    found, before = [], torch.get_num_threads()

    def library(family, dtype):
        loaded = _build.library(family, dtype)
        return type("Library", (), {"__getattr__": lambda self, name: Watched(getattr(loaded, name), found)})()

    monkeypatch.setattr(_pack, "library", library)
    monkeypatch.setattr(_pack, "_functions", {})
    _pack.plans.clear()
    torch.set_num_threads(1)
    yield found
    torch.set_num_threads(before)
    _pack.plans.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_ordinary_numbers_give_no_denormals(name, dtype, found):
    function, shapes = CASES[name]
    tensors = test_contract.draw(*shapes(32), dtype=dtype)
    torch.autograd.grad(function(*tensors).sum(), tensors)
    assert not any(found)


def test_a_denormal_would_be_seen(found):
    fastkl.normal_log_prob(*torch.full((3, 8, 4), 1e-30, dtype=torch.float32))
    assert any(found)
