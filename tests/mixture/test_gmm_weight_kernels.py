"""The launchers of responsibilities and moments for one shared mixture, against the float64 definition."""

import pytest
import torch

from gmm_helpers import outputs
from helpers import DEVICE, assert_as_good_as_eager, launcher, poisoned_memory
from shared_mixture import compare, draw, joint


@pytest.mark.parametrize("logit_rows", [1, 36, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_responsibilities(dtype, logit_rows):
    fwd, bwd = launcher("gmm_responsibilities.fwd"), launcher("gmm_responsibilities.bwd")
    tensors = draw(36, 20, 3, dtype=dtype, logit_rows=logit_rows)
    z, _, logits, means, logvars = tensors
    inputs = (z, logits, means, logvars, None)
    with poisoned_memory():
        log_r = fwd(*inputs, "exact")
        dlog_r = torch.randn(20, 36, dtype=log_r.dtype, generator=torch.Generator().manual_seed(1)).to(DEVICE).t()
        gradients = []
        for wanted in ({0}, {1, 2, 3}):
            found = outputs(inputs, wanted)
            assert bwd(dlog_r, log_r, *inputs, *found, "exact") is None
            gradients += [t for t in found if t is not None]
    units = 2.0 if dtype.itemsize == 2 else 8.0
    compare([log_r, *gradients], tensors, lambda values: values.log_softmax(-1), dlog_r, "point", units)


@pytest.mark.parametrize("spread", ["diagonal", "spherical", None])
def test_moments(spread):
    fwd = launcher("gmm_moments.fwd")
    tensors = draw(100, 20, 3, spread=spread)
    z, _, logits, means, logvars = tensors
    with poisoned_memory():
        actual = fwd(z, logits, means, logvars, None)
        empty = fwd(z[:0], logits, means, logvars, None)
    assert [t.shape for t in empty] == [(0,), (20,), (20, 3), (20, 3)]
    assert all((t == 0).all() for t in empty)
    results = []
    for dtype in (torch.float64, torch.float32):
        values = joint(tensors, "point", dtype)[1].detach()
        difference = z.to(dtype)[:, None] - means.to(dtype)
        weight = values.softmax(-1)[..., None]
        sums = [(weight * difference**i).sum(0) for i in range(3)]
        results.append([values.logsumexp(-1), sums[0][:, 0], *sums[1:]])
    for got, naive, truth in zip(actual, results[1], results[0], strict=True):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=truth.abs().max())
