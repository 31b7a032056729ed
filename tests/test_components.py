"""Mixtures whose components are sharded: 2, 3 and 4 processes find what one finds."""

import sys
from pathlib import Path

import pytest
import torch

from vae_helpers import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")
if torch.distributed.is_available():
    import component_cases as cases
else:
    cases = None
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of each process for all cases; none of the fourth where the mesh has three."""
    folder = tmp_path_factory.mktemp("components")
    done = run([sys.executable, str(Path(cases.__file__)), str(folder)], timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize(("at", "name", "dtype"), cases.RUNS if cases else ())
def test_sharded_components_find_what_one_process_finds(found, at, name, dtype):
    """Errors are those against float64, relative to the largest number of each tensor; one process's are allowed."""
    (one, *_), (exact, *_) = cases.run(name, dtype), cases.run(name, torch.float64)
    for rank in found:
        for actual, alone, wanted in zip(rank.get((at, name, dtype), [()])[0], one, exact):
            assert actual.shape == wanted.shape
            if wanted.abs().sum() == 0:  # without rows
                assert actual.abs().sum() == 0
                continue
            error, allowed = ((found - wanted).abs().max() / wanted.abs().max() for found in (actual, alone))
            assert error <= allowed + TOLERANCE[dtype]


@pytest.mark.parametrize("at", cases.SIZES if cases else ())
@pytest.mark.parametrize(
    ("name", "gathered", "summed"),
    [
        ("gmm_log_prob", 8 * (cases.N + 1), 4 * cases.N * cases.D),
        ("gmm_responsibilities", 8 * cases.N, 8 * cases.N + 4 * cases.N * cases.D),
        ("kl_gmm", 8 * (2 * cases.N + 1), 2 * 4 * cases.N * cases.D),  # of two samples; gradients of mu and logvar
    ],
)
def test_the_traffic_of_float32_is_that_of_the_docstring(found, at, name, gathered, summed):
    for rank in found[: int(at)]:
        traffic = dict(rank[at, name, torch.float32][2])
        seed = 8 if name == "kl_gmm" else 0
        assert traffic == {"gathered": gathered, "summed": summed + seed}


def test_no_tensor_of_rows_times_components_is_allocated(found):
    """Not even of the process's own components."""
    for rank in found[:2]:
        assert max(rank["memory"]) < 4 * cases.LARGE[0] * cases.LARGE[1] // 2 // 4


def test_a_second_derivative_is_refused(found):
    assert "RuntimeError: a mixture whose components are sharded has no second derivative" in found[0]["refusal"]


@pytest.mark.parametrize(
    ("at", "name", "placements"),
    [
        ("3", "gmm_log_prob", "(Replicate(),)"),
        ("3", "gmm_responsibilities", "(Shard(dim=1),)"),
        ("rows and components", "gmm_responsibilities", "(Shard(dim=0), Shard(dim=1))"),
        ("rows as components", "gmm_responsibilities", "(Shard(dim=0),)"),
    ],
)
def test_responsibilities_stay_sharded_as_the_components_are(found, at, name, placements):
    assert found[0][at, name, torch.float64][1] == placements
