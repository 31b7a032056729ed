"""Ops, priors and seeds on DTensors, and priors under fully_shard: four processes find what one finds."""

import sys
from pathlib import Path

import pytest
import torch

from vae_helpers import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")
if torch.distributed.is_available():
    import sharding_cases as cases
else:
    cases = None


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of each process for all cases."""
    folder = tmp_path_factory.mktemp("sharding")
    done = run([sys.executable, str(Path(cases.__file__)), str(folder)], timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize(("layout", "name"), cases.RUNS if cases else ())
def test_an_op_on_dtensors_finds_what_one_process_finds(found, layout, name):
    expected, _ = cases.run(*cases.CASES[name])
    for rank in found:
        torch.testing.assert_close(rank[layout, name][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "name", "placements"),
    [
        ("rows", "kl_normal, shared prior", "(Shard(dim=0), Shard(dim=0))"),
        ("rows and columns", "kl_normal", "(Shard(dim=0), Partial(sum))"),
        ("rows and columns", "kl_normal, elements", "(Shard(dim=0), Shard(dim=1))"),
        ("columns and addends", "kl_normal_per_dim", "(Shard(dim=0), Replicate())"),
        ("rows and columns", "rsample_normal", "(Shard(dim=1), Shard(dim=2))"),
        ("rows and columns", "gmm_log_prob", "(Shard(dim=0), Replicate())"),
        ("rows and columns", "gmm_log_prob, samples", "(Shard(dim=0), Shard(dim=1))"),
        ("rows", "kl_gmm", "(Shard(dim=0), Shard(dim=0))"),
        ("rows", "gumbel_softmax", "(Shard(dim=0), Shard(dim=0))"),
        ("rows", "mmd", "(Replicate(), Replicate())"),
    ],
)
def test_the_result_stays_sharded_where_the_op_allows_it(found, layout, name, placements):
    assert found[0][layout, name][1] == placements


@pytest.mark.parametrize("name", cases.PRIORS if cases else ())
def test_a_sharded_prior_gathers_its_parameters_in_its_methods(found, name):
    value, *others = cases.train_prior(name)
    found = [rank["prior", name] for rank in found]
    torch.testing.assert_close(sum(each[0] for each in found) / 4, value)
    for each in found:
        torch.testing.assert_close(each[1:], others)


def test_a_plain_tensor_beside_dtensors_is_refused(found):
    assert all("TypeError: logvar is a plain tensor beside DTensors" in rank["refusals"]["mixed"] for rank in found)


def test_a_sharded_prior_refuses_to_be_fitted(found):
    assert all("RuntimeError: fit a prior before fully_shard" in rank["refusals"]["fit"] for rank in found)


def test_all_processes_of_a_mesh_draw_from_one_seed(found):
    """That of the first: a DTensor's value does not depend on a process's generator."""
    torch.manual_seed(0)
    zero = torch.zeros(4, 3)
    expected = cases.fastkl.rsample_normal(zero, zero)
    for rank in found:
        torch.testing.assert_close(rank["own seeds"], expected)


@pytest.mark.parametrize(
    ("name", "same"), [("alike", True), ("seed", True), ("by rank", False), ("seed by rank", False)]
)
def test_plain_tensors_have_the_same_noise_where_generators_or_seeds_are_the_same(found, name, same):
    """As docs/distributed.md says: nothing knows the rank."""
    first, *others = (rank["noise"][name] for rank in found)
    assert [torch.equal(first, other) for other in others] == [same] * 3
