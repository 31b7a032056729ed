"""Data-parallel wrappers find the tensors in what a model's forward returns, which they have to hook."""

import sys
from pathlib import Path

import pytest
import torch

from vae_helpers import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")
if torch.distributed.is_available():
    import parallel_cases
else:
    parallel_cases = None


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of two processes for all cases."""
    folder = tmp_path_factory.mktemp("parallel")
    done = run([sys.executable, str(Path(parallel_cases.__file__)), str(folder)], timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", parallel_cases.CASES if parallel_cases else ())
@pytest.mark.parametrize("wrapper", parallel_cases.WRAPPERS if parallel_cases else ())
def test_two_processes_train_as_one_does(found, wrapper, name):
    first, second = (rank[wrapper, name] for rank in found)
    assert isinstance(first, list), first
    for one, two, (value, *gradients) in zip(first, second, parallel_cases.train(name)):
        torch.testing.assert_close((one[0] + two[0]) / 2, value)
        for parts in (one[1:], two[1:]):
            torch.testing.assert_close(parts, gradients)
