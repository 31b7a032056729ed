"""Log-responsibilities and moments of a mixture in C, called directly, against the formula in float64."""

import math

import pytest
import torch

from fastkl.native import _build, mixture

from gmm_helpers import draw
from helpers import DEVICE
from test_gmm_native import SIZES, error, inputs_of

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
]
SHARED = [size for size, (*_, weight_sets, sets) in SIZES.items() if weight_sets == sets == 1]


def joint_of(z, logits, means, logvars):
    data = max(len(logits), len(means)) if max(len(logits), len(means)) > 1 else len(z)
    z = z.reshape(-1, data, 1, z.shape[-1])
    own = means.new_zeros(1, 1, 1) if logvars is None else logvars
    terms = (z - means) ** 2 * torch.exp(-own) + own + math.log(2 * math.pi)
    return (torch.log_softmax(logits, -1) - 0.5 * terms.sum(-1)).flatten(0, 1)


def limit_of(dtype, joint):
    """The rounding of ln pi + ln N is an error of the responsibility relative to it, in any formula."""
    return 1e-12 if dtype == torch.float64 else 1e-5 + 2 * torch.finfo(dtype).eps * joint.abs().max().item()


def case(size, spread, dtype):
    (z, _, logits, means, logvars), _ = inputs_of(size, "point", spread, dtype)
    return [z, logits, means, logvars]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", ["full", "spherical"])
@pytest.mark.parametrize("size", SIZES)
def test_log_responsibilities_and_their_gradients_are_those_of_the_formula(size, spread, dtype):
    tensors = case(size, spread, dtype)
    leaves = [t.double().requires_grad_() for t in tensors]
    joint = joint_of(*leaves)
    exact, limit = torch.log_softmax(joint, -1), limit_of(dtype, joint)
    dlog_r = draw(*exact.shape, seed=5, dtype=dtype)
    log_r = mixture.gmm_responsibilities_fwd(*tensors, None, "exact")
    outputs = [torch.full_like(t, math.nan) for t in tensors]
    assert mixture.gmm_responsibilities_bwd(dlog_r, log_r, *tensors, None, *outputs, None, "exact") is None
    gradients = torch.autograd.grad(exact, leaves, dlog_r.double())
    assert error(log_r, exact.detach()) < limit
    assert [name for name, a, b in zip("zlmv", outputs, gradients) if not error(a, b) < limit] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", ["full", "tied", "none"])
@pytest.mark.parametrize("size", SHARED)
def test_moments_are_those_of_the_formula(size, spread, dtype):
    tensors = case(size, spread, dtype)
    z, _, means, _ = exactly = [None if t is None else t.double() for t in tensors]
    joint = joint_of(*exactly)
    r, difference = torch.softmax(joint, -1), z[:, None] - means[0]
    exact = [joint.logsumexp(-1), r.sum(0)]
    exact += [(r[..., None] * difference).sum(0), (r[..., None] * difference**2).sum(0)]
    limit = 3e-5 if dtype == torch.float32 else 1e-12
    assert [
        i for i, (a, b) in enumerate(zip(mixture.gmm_moments_fwd(*tensors, None), exact)) if not error(a, b) < limit
    ] == []


def test_no_responsibility_is_too_small_for_its_logarithm():
    z, means = torch.zeros(3, 2), torch.tensor([[[0.0, 0.0], [300.0, 0.0]]])
    log_r = mixture.gmm_responsibilities_fwd(z, torch.zeros(1, 2), means, None, None, "exact")
    torch.testing.assert_close(log_r, torch.tensor([[0.0, -45000.0]]).expand(3, 2))


def test_a_component_of_weight_0_and_a_row_of_density_0():
    z, means, logits = torch.tensor([[0.0], [1e30]]), torch.zeros(1, 2, 1), torch.tensor([[0.0, -math.inf]])
    log_r = mixture.gmm_responsibilities_fwd(z, logits, means, None, None, "exact")
    assert log_r[0].tolist() == [0.0, -math.inf]
    assert log_r[1].isnan().all()
    dz, dlog_r = torch.full_like(z, math.nan), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    mixture.gmm_responsibilities_bwd(dlog_r, log_r, z, logits, means, None, None, dz, None, None, None, None, "exact")
    assert dz.flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", ["several sums of rows", "slices of components"])
def test_results_do_not_depend_on_the_number_of_threads(size):
    tensors, found = case(size, "full", torch.float32), []
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            log_r = mixture.gmm_responsibilities_fwd(*tensors, None, "exact")
            outputs = [torch.empty_like(t) for t in tensors]
            mixture.gmm_responsibilities_bwd(log_r.sin(), log_r, *tensors, None, *outputs, None, "exact")
            found.append([log_r, *outputs, *mixture.gmm_moments_fwd(*tensors, None)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))
