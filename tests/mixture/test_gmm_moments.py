"""gmm_moments: one step of expectation maximisation, for one mixture and for several."""

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.mixture import _at_once

from gmm_helpers import BACKENDS, draw, ordinary, triangles
from helpers import DTYPES, implementation


@pytest.mark.parametrize("small", [True, False])
def test_moments_are_one_step_of_em(monkeypatch, small):
    monkeypatch.setattr(_at_once, "SMALL", _at_once.SMALL if small else 0)
    z, logits, means, logvars = ordinary()
    found = fastkl.gmm_moments(z.view(4, 10, 16), logits, means, logvars)
    r = reference.gmm_responsibilities(z, logits, means, logvars).exp()
    difference = z.unsqueeze(1) - means
    torch.testing.assert_close(found.log_prob.flatten(), reference.gmm_log_prob(z, logits, means, logvars))
    torch.testing.assert_close(found.counts, r.sum(0))
    torch.testing.assert_close(found.first, torch.einsum("nk,nkd->kd", r, difference))
    torch.testing.assert_close(found.second, torch.einsum("nk,nkd->kd", r, difference**2))
    tril = triangles(20, size=16)
    r = reference.gmm_responsibilities(z, logits, means, scale_tril=tril).exp()
    found = fastkl.gmm_moments(z, logits, means, scale_tril=tril)
    torch.testing.assert_close(found.second, torch.einsum("nk,nkd,nke->kde", r, difference, difference))
    with pytest.raises(ValueError, match="differ by datum"):
        fastkl.gmm_moments(z, logits, means.expand(40, 20, 16).contiguous())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("small", [True, False])
def test_no_rows_are_sums_of_nothing(monkeypatch, backend, full, small):
    monkeypatch.setattr(_at_once, "SMALL", _at_once.SMALL if small else 0)
    for batch in ((0,), (0, 3), (3, 0)):
        with implementation(backend):
            spread = {"scale_tril": triangles(5, size=2)} if full else {"logvars": draw(5, 2)}
            found = fastkl.gmm_moments(draw(*batch, 2), draw(5), draw(5, 2, seed=1), **spread)
        assert found.log_prob.shape == batch
        assert [t.shape for t in found[1:]] == [(5,), (5, 2), (5, 2, 2) if full else (5, 2)]
        assert all((moment == 0).all() for moment in found[1:])


CASES = {  # dimensions that vmap takes away from (z, logits, means, spread)
    "z": (0, None, None, None),
    "z, inner": (1, None, None, None),
    "mixture": (None, 0, 0, 0),
    "means": (None, None, 1, None),
    "everything": (1, 0, 1, 0),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_vmap(backend, full, case):
    examples, dims = 3, CASES[case]
    spread = triangles(examples, 5, size=2) if full else draw(examples, 5, 2, seed=3)
    inputs = [draw(examples, 11, 2), draw(examples, 5, seed=1), draw(examples, 5, 2, seed=2), spread]
    inputs = [tensor[0] if dim is None else tensor.movedim(0, dim) for tensor, dim in zip(inputs, dims)]

    def moments(z, logits, means, spread):
        return fastkl.gmm_moments(z, logits, means, **{"scale_tril" if full else "logvars": spread})

    with implementation(backend):
        actual = torch.func.vmap(moments, dims)(*inputs)
        for example in range(examples):
            own = [tensor if dim is None else tensor.select(dim, example) for tensor, dim in zip(inputs, dims)]
            for batched, expected in zip(actual, moments(*own)):
                torch.testing.assert_close(batched[example], expected)


def test_no_gradient():
    z, logits, means = (tensor.requires_grad_() for tensor in ordinary()[:3])
    assert not any(part.requires_grad for part in fastkl.gmm_moments(z, logits, means))


@pytest.mark.parametrize("small", [True, False])
def test_dtypes(monkeypatch, small):
    """The sums of shared weights are taken in float64; what is returned is in the compute dtype."""
    monkeypatch.setattr(_at_once, "SMALL", _at_once.SMALL if small else 0)
    for dtype in DTYPES:
        found = fastkl.gmm_moments(*(tensor.to(dtype) for tensor in ordinary()))
        assert {part.dtype for part in found} == {torch.promote_types(dtype, torch.float32)}
