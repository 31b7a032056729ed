"""Mixtures and bounds of weight 0, infinitely far away, or narrower than float32's 1 / sigma.

The truth is the formula in float64, written apart.
"""

import math
from unittest import mock

import pytest
import torch

import fastkl

from helpers import DEVICE, implementation, leaf

CASES = ["weightless far", "far", "far row", "narrow row", "equal means", "narrow", "both narrow", "wide q"]


def inputs_of(case):
    """[z, logvar, logits, means, logvars] and the weights of the rows."""
    generator = torch.Generator().manual_seed(0)
    z, means = (torch.randn(n, 2, generator=generator) for n in (4, 3))
    logvar, logits, logvars, weight = torch.zeros(4, 2), torch.zeros(3), torch.zeros(3, 2), torch.ones(4)
    if case == "weightless far":
        logits[2], means[2], logvars[2] = -math.inf, 1e38, -10.0
    if case == "far":
        means[2], logvars[2] = 1e38, -10.0
    if case == "far row":
        z[1], weight[1] = 1e30, 0.0
    if case == "narrow row":
        z[1], means[2], logvars[2], weight[1] = 2.0, 2.0, -200.0, 0.0
    if case == "equal means":
        z[:], logvars[2] = means[2], -200.0
    if case == "narrow":
        logvars[2] = -120.0
    if case == "both narrow":
        logvar[:], logvars[2] = -200.0, -200.0
    if case == "wide q":
        logvar[1], weight[1] = 200.0, 0.0
    return [z, logvar, logits, means, logvars], weight


def log_prob(form, z, logvar, logits, means, logvars):
    spread = logvars.expand(means.shape)
    if form == "convolved":
        spread = torch.log(spread.exp() + logvar.exp().unsqueeze(-2))
    terms = (z.unsqueeze(-2) - means) ** 2 * torch.exp(-spread) + spread + math.log(2 * math.pi)
    if form == "expected":
        terms = terms + logvar.exp().unsqueeze(-2) * torch.exp(-spread)
    return torch.logsumexp(torch.log_softmax(logits, -1) - 0.5 * terms.sum(-1), -1)


def truth(form, *inputs):
    if form == "point":
        return log_prob(form, *inputs)
    return -0.5 * (inputs[1] + math.log(2 * math.pi * math.e)).sum(-1) - log_prob(form, *inputs)


def ours(form, z, logvar, logits, means, logvars):
    if form == "point":
        return fastkl.gmm_log_prob(z, logits, means, logvars)
    method = {"convolved": "lower", "expected": "upper"}[form]
    return fastkl.kl_gmm(z, logvar, logits, means, logvars, method=method)


def check(way, case, form, per_datum, small=True):
    tensors, weight = inputs_of(case)
    if per_datum:
        tensors[3:] = [tensor.expand(4, 3, 2) for tensor in tensors[3:]]
    weight = weight.to(DEVICE)
    exact, tensors = [leaf(t.double()) for t in tensors], [leaf(t.clone()) for t in tensors]
    with implementation(way), mock.patch("fastkl.ops.mixture._at_once.SMALL", 1 << 17 if small else 0):
        found = ours(form, *tensors)
        gradients = torch.autograd.grad(found, tensors, weight, allow_unused=True)
    value = truth(form, *exact)
    expected = torch.autograd.grad(value, exact, weight.double(), allow_unused=True)
    for actual, right in zip((found, *gradients), (value, *expected)):
        if right is not None:
            torch.testing.assert_close(actual, right.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("way", "small"), [("torch", True), ("torch", False), ("native", True)])
@pytest.mark.parametrize("per_datum", [False, True])
@pytest.mark.parametrize("form", ["point", "expected", "convolved"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_mixtures_are_right_or_infinite_but_numbers(case, form, per_datum, way, small):
    check(way, case, form, per_datum, small)


@pytest.mark.parametrize("per_datum", [False, True])
@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case in ("weightless far", "far row") for form in ("point", "expected", "convolved")]
    + [("narrow row", "point"), ("equal means", "point"), ("wide q", "expected")],
)
def test_kernels_leave_no_gradient_of_weight_zero(case, form, per_datum):
    check("triton", case, form, per_datum)


@pytest.mark.parametrize("small", [True, False], ids=["at once", "sweep"])
@pytest.mark.parametrize("per_datum", [False, True])
def test_responsibilities_of_weight_zero_have_no_gradient(per_datum, small):
    """Of a row infinitely far from all components."""
    (z, _, logits, means, logvars), weight = inputs_of("far row")
    means, logvars = (t.expand(4, 3, 2) if per_datum else t for t in (means, logvars))
    tensors = [leaf(t.clone()) for t in (z, logits, means, logvars)]
    with implementation("torch"), mock.patch("fastkl.ops.mixture._at_once.SMALL", 1 << 17 if small else 0):
        found = fastkl.gmm_responsibilities(*tensors)
        incoming = weight.to(DEVICE).unsqueeze(1) * torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
        gradients = torch.autograd.grad(found, tensors, incoming)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][1] == 0).all()


def test_a_far_component_pulls_as_its_distance_says():
    """The squared distance overflows, but the gradient of the log-responsibility does not."""
    z, logits, means = leaf(torch.zeros(1, 1)), torch.zeros(2), torch.tensor([[0.0], [1e25]])
    with implementation("torch"):
        value = fastkl.gmm_responsibilities(z, logits.to(DEVICE), means.to(DEVICE))[0, 1]
        assert torch.autograd.grad(value, z)[0].item() == pytest.approx(1e25)


# Log-variances of q and of the last component, more than 88 apart or beyond: 1 / sigma^2 or their ratio overflows.
APART = [
    (0.0, -90.0),
    (0.0, -120.0),
    (0.0, -300.0),
    (60.0, -60.0),
    (90.0, 0.0),
    (120.0, 0.0),
    (95.0, 95.0),
    (-100.0, -100.0),
]


def bounds_of(way, spreads, wanted):
    """Both bounds and the gradients of those that are wanted, and the same by the formula in float64."""
    (mu, logvar, logits, means, logvars), _ = inputs_of("")
    logvar[:], logvars[2] = spreads
    tensors = [mu, logvar, logits, means, logvars]
    exact, tensors = [leaf(t.double()) for t in tensors], [leaf(t.clone()) for t in tensors]
    results = []
    for inputs in (tensors, exact):
        if inputs is exact:
            both = [truth(form, *inputs) for form in ("convolved", "expected")]
        else:
            both = fastkl.kl_gmm_bounds(*inputs)
        total = sum(bound.sum() for bound, want in zip(both, wanted) if want)
        results.append([*both, *torch.autograd.grad(total, inputs)])
    return results


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "lower", "upper"])
@pytest.mark.parametrize("spreads", APART, ids=str)
@pytest.mark.parametrize("way", ["torch", "native", "triton"])
def test_bounds_of_log_variances_far_apart(way, spreads, wanted):
    if spreads[0] - spreads[1] > 88 and wanted[1] and spreads[0] > 0:
        wanted = (wanted[0], False)  # the upper bound overflows there, or is so large that no digit of ln K is left
    if not any(wanted):
        return
    with implementation(way):
        found, expected = bounds_of(way, spreads, wanted)
    for actual, right in zip(found, expected):
        torch.testing.assert_close(actual, right.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_datum", [False, True])
@pytest.mark.parametrize("spreads", [(90.0, 0.0), (200.0, 0.0), (95.0, 95.0), (0.0, 95.0)], ids=str)
def test_a_lower_bound_that_overflows_is_not_a_number(spreads, per_datum):
    """It must not be finite: ln inf used to be 89."""
    (mu, logvar, logits, means, logvars), _ = inputs_of("")
    logvar[:], logvars[:] = spreads
    means, logvars = (t.expand(4, 3, 2) if per_datum else t for t in (means, logvars))
    tensors = [leaf(t) for t in (mu, logvar, logits, means, logvars)]
    with implementation("triton"):
        assert fastkl.kl_gmm(*tensors, method="lower").isnan().all()
        if spreads[0] == 200 and not per_datum:
            assert fastkl.kl_gmm_bounds(*tensors)[0].isnan().all()


@pytest.mark.parametrize("per_datum", [False, True])
@pytest.mark.parametrize("narrow", [-95.0, -300.0])
def test_subnormal_component_width_is_clamped(narrow, per_datum):
    """In the lower bound, with an even narrower q: the logarithm of a subnormal sum of variances is inaccurate."""
    (mu, logvar, logits, means, logvars), _ = inputs_of("")
    mu[:], means[2], logvar[:], logvars[2] = 0.0, 0.0, -110.0, narrow
    exact = [t.double() for t in (mu, logvar, logits, means, logvars.clamp(min=-87.0))]
    means, logvars = (t.expand(4, 3, 2) if per_datum else t for t in (means, logvars))
    with implementation("triton"):
        found = fastkl.kl_gmm(*(t.to(DEVICE) for t in (mu, logvar, logits, means, logvars)), method="lower")
    torch.testing.assert_close(found.cpu(), truth("convolved", *exact).float(), rtol=1e-5, atol=1e-5)
