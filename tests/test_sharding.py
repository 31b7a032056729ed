"""Ops, priors and seeds on DTensors, and priors under fully_shard: four processes find what one finds."""

import itertools
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


def test_one_seed_gives_each_rank_other_noise_and_a_pair_that_of_the_rank_in_it(found):
    """In every function that draws."""
    noise = [rank["noise"] for rank in found]
    alone = cases.drawn(7)  # here, without ranks
    for name, value in alone.items():
        ranks = [each["number"][name] for each in noise]
        assert torch.equal(ranks[0], value), name
        assert not any(torch.equal(*pair) for pair in itertools.combinations(ranks, 2)), name
        for each, own in zip(noise, ranks):
            assert torch.equal(each["tensor"][name], own), name
            assert torch.equal(each["shared"][name], value), name
            assert torch.equal(each["shared tensor"][name], value), name
            assert torch.equal(each["of rank 2"][name], ranks[2]), name
    assert torch.equal(cases.drawn((7, 2))["rsample_kl"], noise[2]["number"]["rsample_kl"])


def test_without_a_seed_and_in_a_fit_ranks_are_alike(found):
    """As docs/distributed.md says: equal generators draw the same seed."""
    for name in ("alike", "fit"):
        first, *others = (rank["noise"][name] for rank in found)
        assert all(torch.equal(first, other) for other in others)


def test_the_compiler_folds_the_rank_into_a_seed(found):
    for rank in found:
        number, tensor, shared, _ = rank["noise"]["compiled"]
        torch.testing.assert_close(number, rank["noise"]["number"]["rsample_normal"])
        torch.testing.assert_close(tensor, number)
        torch.testing.assert_close(shared, found[0]["noise"]["compiled"][0])
        assert not torch.equal(rank["noise"]["compiled"][3], number)


@pytest.mark.parametrize("seed", [(7, -1), (7, 0.5), (7,), (7, 0, 0), (0.5, 1), (2**63, 1), ([7], 0), (None, 0)])
def test_a_pair_that_is_no_seed_and_rank_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match="seed"):
        cases.fastkl.rsample_normal(torch.zeros(3), torch.zeros(3), seed=seed)
