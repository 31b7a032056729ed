"""Batch statistics over 2 and 3 processes equal those of the global batch, and so do gradients."""

import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import fastkl
from fastkl.ops import _group

import group_cases
from vae_helpers import run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build has no torch.distributed")


@pytest.fixture(scope="module", params=[2, 3])
def found(request, tmp_path_factory):
    """The results of each process for all cases, in order of rank."""
    folder = tmp_path_factory.mktemp("group")
    done = run([sys.executable, str(Path(group_cases.__file__)), str(request.param), str(folder)], timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", group_cases.CASES)
def test_several_processes_find_what_one_finds(found, name):
    case, leaves = group_cases.CASES[name]
    value, *gradients = group_cases.run(case, leaves, None)
    values, *parts = zip(*(rank[name] for rank in found))
    for each in [torch.cat(values)] if value.dim() else values:
        torch.testing.assert_close(each, value)
    for gradient, part in zip(gradients, parts):
        torch.testing.assert_close(torch.cat(part), gradient)


def test_mmd_passes_blocks_around_a_ring(found):
    """R - 1 blocks of x and y from each process; besides, numbers: of rows, the value's parts, and its gradient."""
    ranks, rows = len(found), -(-group_cases.ROWS // len(found))
    for rank in found:
        expected = {"gathered": 2 * 8, "sent": 8 * (ranks - 1) * 2 * rows * 3, "summed": 8 + 8}
        assert rank["traffic", "mmd"] == expected


def test_total_correlation_passes_blocks_around_a_ring(found):
    """Forward mu and logvar of R - 1 processes, and one number that tells of far rows; backward these again, and the
    gradients of R. Nothing of the size of the whole batch is sent."""
    ranks, rows = len(found), -(-group_cases.ROWS // len(found))
    for rank in found:
        expected = {"gathered": 8, "sent": 8 * (ranks - 1 + 2 * ranks - 1) * 2 * rows * 3, "summed": 4}
        assert rank["traffic", "total_correlation"] == expected


def test_total_correlation_has_a_case_of_a_row_that_is_far_from_its_own_posterior():
    """Its joint's sum is negated; a group gathers the posteriors then."""
    _, leaves = group_cases.CASES["total_correlation, a row far from its own"]
    sums = torch.ops.fastkl.total_correlation_fwd(*leaves, 0, 50, True)[3]
    assert [value < 0 for value in sums.tolist()] == [row == 4 for row in range(group_cases.ROWS)]


def test_sinkhorn_divergence_sends_points_once_and_then_potentials(found):
    """At every update, those of x and y, of x with itself, and of y with itself."""
    rows, updates = -(-group_cases.ROWS // len(found)), 2 + len(fastkl.reference.sinkhorn_schedule(5.0, 1.0, 0.5, 0))
    for rank in found:
        points = 8 * 2 * rows * (3 + 1)
        expected = {"gathered": 2 * 8 + points + 8 * updates * 4 * rows, "summed": 8 + 8}
        assert rank["traffic", "sinkhorn_divergence"] == expected


def test_what_is_no_group_is_refused():
    with pytest.raises(TypeError, match=r"group must be .* got str"):
        _group.gather("world", torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["gather", "total"])
def test_forward_mode_with_a_group_is_refused(monkeypatch, name):
    """Before anything is exchanged: no other process is there."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    monkeypatch.setattr(_group, "row_counts", lambda *_: [2, 2])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3))
        with pytest.raises(NotImplementedError, match="group= of several processes has no forward-mode"):
            getattr(_group, name)(object(), dual)
