"""The mixture's loops in C, called directly: any shape, form and layout, against the formula in float64."""

import itertools
import math

import pytest
import torch

from fastkl.native import _build, mixture

from gmm_helpers import draw
from helpers import DEVICE

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors"),
    pytest.mark.skipif(_build._compiler() is None, reason="no C compiler"),
]

# Rows, components, dimensions, sets of weights, sets of components.
SIZES = {
    "one of each": (1, 1, 1, 1, 1),
    "neither a whole block of rows nor of lanes": (7, 3, 2, 1, 1),
    "several sums of rows": (1100, 20, 3, 1, 1),
    "several blocks of dimensions": (13, 17, 150, 1, 1),
    "slices of components": (9, 600, 130, 1, 1),
    "weights for each datum": (10, 33, 5, 10, 1),
    "weights for each datum, samples": (30, 20, 3, 10, 1),
    "components for each datum": (10, 7, 5, 10, 10),
    "components for each datum, shared weights": (10, 40, 130, 1, 10),
    "components for each datum, samples": (30, 20, 6, 10, 10),
    "many samples of few data": (1400, 3, 2, 2, 2),
    "more dimensions than a tile": (4, 3, 1500, 1, 4),
}
FORMS = ("point", "expected", "convolved")
# Sizes of the log-variances, in terms of (M, K, D).
SPREADS = {"full": "MKD", "spherical": "MK1", "tied": "11D", "tied, per datum": "M1D", "one": "111", "none": ""}


def inputs_of(size, form, spread, dtype):
    """[z, logvar, logits, means, logvars], None for a missing one, and the incoming gradient."""
    rows, count, columns, weight_sets, sets = SIZES[size]
    sizes = {"M": sets, "K": count, "D": columns, "1": 1}
    shapes = [(rows, columns), None if form == "point" else (rows, columns), (weight_sets, count)]
    shapes += [(sets, count, columns), tuple(sizes[name] for name in SPREADS[spread]) or None]
    scales = (1, 0.5, 1, 1, 0.5)
    tensors = [
        None if shape is None else draw(*shape, seed=seed, scale=scale, dtype=dtype)
        for seed, (shape, scale) in enumerate(zip(shapes, scales))
    ]
    return tensors, draw(rows, seed=9, dtype=dtype)


def definition(form, z, logvar, logits, means, logvars):
    data = max(len(logits), len(means)) if max(len(logits), len(means)) > 1 else len(z)
    z, q = (None if t is None else t.reshape(-1, data, 1, t.shape[-1]) for t in (z, logvar))
    own = means.new_zeros(1, 1, 1) if logvars is None else logvars
    spread = torch.logaddexp(own, q) if form == "convolved" else own
    terms = (z - means) ** 2 * torch.exp(-spread) + spread + math.log(2 * math.pi)
    if form == "expected":
        terms = terms + torch.exp(q - spread)
    return torch.logsumexp(torch.log_softmax(logits, -1) - 0.5 * terms.sum(-1), -1).flatten()


def of_definition(form, tensors, dlp, dtype=torch.float64):
    leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in tensors]
    value = definition(form, *leaves)
    found = iter(torch.autograd.grad(value, [t for t in leaves if t is not None], dlp.to(dtype)))
    return [value.detach(), *(None if t is None else next(found) for t in leaves)]


def of_loops(form, tensors, dlp, keep=2, wanted=(True,) * 5):
    lp, density, responsibilities = (*mixture.gmm_log_prob_fwd(*tensors, None, form, "exact", keep), None)[:3]
    outputs = [torch.full_like(t, math.nan) if t is not None and want else None for t, want in zip(tensors, wanted)]
    saved = (dlp, density, responsibilities, *tensors, None)
    assert mixture.gmm_log_prob_bwd(*saved, *outputs, None, form, "exact") is None
    return [lp, *outputs]


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_the_loops_agree_with_the_formula(size, form):
    """In float64 to its rounding, in float32 as well as the formula does there."""
    for spread, kept in zip(SPREADS, itertools.cycle((1, 2))):
        tensors, dlp = inputs_of(size, form, spread, torch.float64)
        exact = of_definition(form, tensors, dlp)
        for actual, right in zip(of_loops(form, tensors, dlp, kept), exact, strict=True):
            assert actual is None or error(actual, right) < 1e-12
        tensors, dlp = [None if t is None else t.float() for t in tensors], dlp.float()
        exact, eager = of_definition(form, tensors, dlp), of_definition(form, tensors, dlp, torch.float32)
        for actual, rough, right in zip(of_loops(form, tensors, dlp, kept), eager, exact, strict=True):
            assert actual is None or error(actual, right) < 2.5 * error(rough, right) + 3e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", ["several sums of rows", "slices of components", "components for each datum, samples"])
def test_results_do_not_depend_on_the_number_of_threads(size, form):
    before, results = torch.get_num_threads(), []
    for spread in ("full", "one"):
        tensors, dlp = inputs_of(size, form, spread, torch.float32)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(of_loops(form, tensors, dlp))
        finally:
            torch.set_num_threads(before)
        first, *others = results
        assert all(a is None or torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        results.clear()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "size", ["weights for each datum, samples", "components for each datum", "several sums of rows"]
)
def test_no_layout_changes_a_result(size, form):
    """Of inputs and outputs."""
    tensors, dlp = inputs_of(size, form, "full", torch.float32)
    strided = [None if t is None else t.mT.contiguous().mT for t in tensors]
    expected, found = of_loops(form, tensors, dlp), of_loops(form, strided, dlp.repeat_interleave(2)[::2])
    assert all(a is None or torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    ones = of_loops(form, tensors, torch.ones(()).expand(dlp.shape))
    assert all(a is None or torch.equal(a, b) for a, b in zip(of_loops(form, tensors, torch.ones_like(dlp)), ones))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "size", ["slices of components", "components for each datum", "weights for each datum, samples"]
)
def test_16_bits_are_rounded_once(size, dtype):
    """The gradients are those of the same numbers in float32, rounded."""
    tensors, dlp = inputs_of(size, "expected", "full", dtype)
    wide = [t.float() for t in tensors]
    found, expected = of_loops("expected", tensors, dlp.float()), of_loops("expected", wide, dlp.float())
    assert torch.equal(found[0], expected[0])
    for actual, right in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(actual, right.to(dtype))


@pytest.mark.parametrize(
    "size", ["several sums of rows", "components for each datum", "components for each datum, samples"]
)
def test_each_gradient_may_be_wanted_alone(size):
    tensors, dlp = inputs_of(size, "convolved", "tied", torch.float32)
    every = of_loops("convolved", tensors, dlp)
    for place in range(5):
        alone = of_loops("convolved", tensors, dlp, wanted=[place == other for other in range(5)])
        assert torch.equal(alone[1 + place], every[1 + place])


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("per_datum", [False, True])
def test_a_component_infinitely_far_away_has_no_gradient(per_datum, kept):
    """Its weight is 0, and 0 times infinity would be NaN."""
    tensors, dlp = inputs_of("neither a whole block of rows nor of lanes", "point", "full", torch.float32)
    z, _, logits, means, logvars = tensors
    if per_datum:
        means, logvars = (t.repeat(7, 1, 1) for t in (means, logvars))
    means[:, 2], logvars[:, 2] = 1e38, -10.0
    near = [z, None, logits[:, :2], means[:, :2], logvars[:, :2]]
    expected = of_definition("point", near, dlp)
    found = of_loops("point", [z, None, logits, means, logvars], dlp, kept)
    shift = torch.logsumexp(logits[0, :2], 0) - torch.logsumexp(logits[0], 0)
    torch.testing.assert_close(found[0].double(), expected[0] + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    assert all((gradient[:, 2] == 0).all() for gradient in found[4:])


def test_equal_terms_add_up():
    """Many equal rows: a sum in float32, one row after the other, would lose digits."""
    count = 100_000
    tensors = [torch.full((count, 1), 0.3), None, torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)]
    *_, dmeans, dlogvars = of_loops("point", tensors, torch.full((count,), 0.1))
    assert dmeans.item() == pytest.approx(count * 0.1 * 0.3, rel=1e-5)
    assert dlogvars.item() == pytest.approx(count * 0.1 * 0.5 * (0.09 - 1), rel=1e-5)


def test_float64_is_not_mixed_with_other_dtypes():
    tensors, _ = inputs_of("neither a whole block of rows nor of lanes", "point", "full", torch.float32)
    tensors[3] = tensors[3].double()
    assert mixture.gmm_log_prob_fwd(*tensors, None, "point", "exact", 0) is NotImplemented


def test_a_negligible_responsibility_is_0():
    """Products with subnormal numbers are ten times slower."""
    z, means = torch.zeros(1, 1), torch.arange(0.0, 40.0)[None, :, None]
    _, _, responsibilities = mixture.gmm_log_prob_fwd(
        z, None, torch.zeros(1, 40), means, None, None, "point", "exact", 2
    )
    assert responsibilities[responsibilities > 0].min() > 1e-26
    assert (responsibilities[0, :10] > 0).all()
