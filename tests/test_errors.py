"""Bad input: an error that names the argument and what was expected, before anything is launched."""

import math

import numpy as np
import pytest
import torch

import fastkl

from helpers import DEVICE

M = torch.zeros(3, 4, device=DEVICE)
INTS = torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)
META = torch.zeros(3, 4, device="meta")

# call -> (error, what its message must say)
KL = {
    "shapes": (lambda f: f(M, M[:2]), ValueError, r"mu \(3, 4\).*logvar \(2, 4\)"),
    "prior shape": (lambda f: f(M, M, M[:, :3], M), ValueError, r"prior_mu \(3, 3\)"),
    "integer mu": (lambda f: f(INTS, M), TypeError, "mu must be a floating-point tensor.*int64"),
    "integer logvar": (lambda f: f(M, INTS), TypeError, "logvar must be a floating-point tensor"),
    "integer prior": (lambda f: f(M, M, M, INTS), TypeError, "prior_logvar must be a floating-point tensor"),
    "float8": (
        lambda f: f(M, M.to(torch.float8_e4m3fn)),
        TypeError,
        "logvar must be.*float8_e4m3fn; float16, bfloat16",
    ),
    "not a tensor": (lambda f: f(M, 0.0), TypeError, "logvar must be a torch.Tensor, got float"),
    "devices": (lambda f: f(M, META), ValueError, "logvar is on meta, but mu is on"),
    "event 0": (lambda f: f(M, M, event_ndim=0), ValueError, "event_ndim must be at least 1, got 0"),
    "event too large": (lambda f: f(M, M, event_ndim=3), ValueError, r"event_ndim=3.*\(3, 4\) has 2"),
    "event type": (lambda f: f(M, M, event_ndim=1.0), TypeError, "event_ndim must be an int, got float"),
    "scalars": (lambda f: f(M[0, 0], M[0, 0]), ValueError, "event_ndim=1 needs at least 1 dim"),
    "scale": (lambda f: f(M, M, scale="sigma"), ValueError, "scale must be one of 'logvar'.*got 'sigma'"),
    "bounds order": (lambda f: f(M, M, bounds=(20, -30)), ValueError, r"bounds must be \(low, high\).*20.0, -30.0"),
    "bounds equal": (lambda f: f(M, M, bounds=fastkl.SoftBounds(1, 1)), ValueError, "bounds must be"),
    "bounds nan": (lambda f: f(M, M, bounds=(math.nan, 1.0)), ValueError, "bounds must be"),
    "bounds type": (lambda f: f(M, M, bounds=3.0), TypeError, "bounds must be a pair"),
}
SAMPLING = {
    "samples": (lambda f: f(M, M, num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
    "samples type": (lambda f: f(M, M, num_samples=2.0), TypeError, "num_samples must be an int"),
    "seed and eps": (lambda f: f(M, M, seed=1, eps=M), ValueError, "seed and eps exclude each other"),
    "eps shape": (lambda f: f(M, M, num_samples=2, eps=torch.zeros(3, 3, 4, device=DEVICE)), ValueError, "eps"),
    "eps larger": (lambda f: f(M, M, eps=torch.zeros(2, 3, 4, device=DEVICE)), ValueError, "eps must have the shape"),
    "eps dtype": (lambda f: f(M, M, eps=INTS), TypeError, "eps must be a floating-point tensor"),
    "seed type": (lambda f: f(M, M, seed=1.5), TypeError, "seed must be an int"),
    "seed tensor": (
        lambda f: f(M, M, seed=torch.zeros(2, dtype=torch.int64)),
        TypeError,
        "seed must be an int64 tensor",
    ),
    "NumPy's ints are ints": (lambda f: f(M, M, num_samples=np.int64(0)), ValueError, "num_samples must be at least 1"),
    "seed size": (lambda f: f(M, M, seed=2**63), ValueError, "seed must be below"),
}
PACKED = {
    "odd": (lambda: fastkl.DiagonalNormal.from_packed(M[:, :3]), ValueError, "head packs.*dim=1.*even, got 3"),
    "dim": (lambda: fastkl.DiagonalNormal.from_packed(M, dim=2), ValueError, "dim=2 is out of range for head"),
    "dim type": (lambda: fastkl.DiagonalNormal.from_packed(M, dim=1.0), TypeError, "dim must be an int"),
    "integer": (lambda: fastkl.DiagonalNormal.from_packed(INTS), TypeError, "head must be a floating-point tensor"),
    "event": (lambda: fastkl.DiagonalNormal.from_packed(M, event_ndim=3), ValueError, "event_ndim=3"),
    "scale": (lambda: fastkl.DiagonalNormal(M, M, scale="variance"), ValueError, "scale must be one of"),
    "bounds": (lambda: fastkl.DiagonalNormal(M, M, bounds=(1, 0)), ValueError, "bounds must be"),
    "prior type": (lambda: fastkl.DiagonalNormal(M, M).kl((M, M)), TypeError, "prior must be a fastkl.DiagonalNormal"),
    "prior larger": (
        lambda: fastkl.DiagonalNormal.from_packed(M).kl(fastkl.DiagonalNormal(M, M)), ValueError, r"prior_mu \(3, 4\)",
    ),
}  # fmt: skip


def parameters(cases):
    return pytest.mark.parametrize(("call", "error", "message"), cases.values(), ids=cases)


@pytest.mark.parametrize("op", [fastkl.kl_normal, fastkl.kl_normal_per_dim, fastkl.rsample_kl])
@parameters(KL)
def test_kl(op, call, error, message):
    with pytest.raises(error, match=message):
        call(op)


@pytest.mark.parametrize("op", [fastkl.rsample_normal, fastkl.rsample_kl])
@parameters(SAMPLING)
def test_sampling(op, call, error, message):
    with pytest.raises(error, match=message):
        call(op)


@parameters(PACKED)
def test_packed(call, error, message):
    with pytest.raises(error, match=message):
        call()


@parameters({k: KL[k] for k in ("shapes", "integer mu", "integer logvar", "not a tensor", "devices", "scale")})
def test_rsample_normal_shares_the_checks(call, error, message):
    with pytest.raises(error, match=message):
        call(fastkl.rsample_normal)
