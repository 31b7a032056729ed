"""A number as the log-variance of all components of a mixture."""

import pytest
import torch

import fastkl

from helpers import DEVICE

SEED = {"seed": 3}
CALLS = {
    "gmm_log_prob": lambda *t: fastkl.gmm_log_prob(*t),
    "gmm_log_prob, tf32": lambda *t: fastkl.gmm_log_prob(*t, precision="tf32"),
    "gmm_responsibilities": lambda *t: fastkl.gmm_responsibilities(*t),
    "gmm_moments": lambda *t: fastkl.gmm_moments(*t)[0],
    "kl_gmm": lambda z, *t: fastkl.kl_gmm(z, torch.zeros_like(z), *t, **SEED),
    "kl_gmm, upper": lambda z, *t: fastkl.kl_gmm(z, torch.zeros_like(z), *t, method="upper"),
    "kl_gmm_bounds": lambda z, *t: torch.stack(fastkl.kl_gmm_bounds(z, torch.zeros_like(z), *t)),
    "rsample_gmm": lambda _, *t: fastkl.rsample_gmm(*t, **SEED),
    "sample_gmm": lambda _, *t: fastkl.sample_gmm(*t, num_samples=2, **SEED)[0],
}
every = pytest.mark.parametrize("name", CALLS)


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (3,), (3, 4))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_number_is_the_log_variance_of_all_components(name, dtype):
    tensors = draw(dtype)
    for number in (0.0, 1, -0.75):
        full = CALLS[name](*tensors, torch.full_like(tensors[2], number))
        found = CALLS[name](*tensors, number)
        assert found.dtype == full.dtype
        torch.testing.assert_close(found, full, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(CALLS[name](*tensors, 0.0), CALLS[name](*tensors), rtol=1e-6, atol=1e-6)


@every
@pytest.mark.parametrize("bad", [True, "0", 1j])
def test_what_is_no_number_is_named(name, bad):
    with pytest.raises(TypeError, match="logvars"):
        CALLS[name](*draw(), bad)
