"""Forward-mode derivatives of every op, compared with finite differences of its values and gradients."""

import pytest
import torch
from test_contract import draw
from test_tensor_states import ALL
from torch.autograd import forward_ad

import fastkl

from helpers import DEVICE, implementation

# Whose value and gradient are not of one function: straight-through, sticking the landing, envelope; or not in float64.
ESTIMATES = {"gumbel_softmax, hard", "kl_gmm, sampled entropy", "sinkhorn_divergence", "gmm_log_prob, tf32x3"}
every = pytest.mark.parametrize("name", [name for name in ALL if name not in ESTIMATES])
STEP = 1e-6


def get(name):
    """(function, inputs, tangents)."""
    function, shapes = ALL[name]
    inputs = [t.detach() for t in draw(*shapes(2))]
    return function, inputs, [t.detach() for t in draw(*shapes(2), seed=1)]


def slope(function, inputs, tangents):
    """Along the tangents, by differences."""
    ends = [function(*(x + step * t for x, t in zip(inputs, tangents))) for step in (STEP, -STEP)]
    return [(a - b) / (2 * STEP) for a, b in zip(*ends)] if type(ends[0]) is tuple else (ends[0] - ends[1]) / (2 * STEP)


def dual(inputs, tangents):
    return [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)]


def gradients_of(function):
    def gradients(*inputs):
        return torch.autograd.grad(function(*inputs).square().sum(), inputs)

    return gradients


@every
def test_tangents(name):
    function, inputs, tangents = get(name)
    expected = slope(function, inputs, tangents)
    with torch.no_grad(), forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(function(*dual(inputs, tangents)))
    torch.testing.assert_close(value, function(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.func.jvp(function, tuple(inputs), tuple(tangents))[1], tangent)
    only = [torch.zeros_like(t) for t in tangents[:-1]] + tangents[-1:]
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves[:-1], forward_ad.make_dual(leaves[-1], tangents[-1]))
        tangent = forward_ad.unpack_dual(value).tangent
    torch.testing.assert_close(tangent.detach(), slope(function, inputs, only), rtol=1e-6, atol=1e-6)


@every
def test_tangents_of_gradients_and_of_tangents(name):
    function, inputs, tangents = get(name)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = slope(gradients_of(function), leaves, tangents)  # H t
    with forward_ad.dual_level():  # forward over reverse mode; no graph of the backward pass
        found = gradients_of(function)(*dual(leaves, tangents))
        over_reverse = [forward_ad.unpack_dual(gradient).tangent for gradient in found]
    zeros = [torch.zeros_like(x) for x in inputs]
    over_reverse = [zero if tangent is None else tangent for tangent, zero in zip(over_reverse, zeros)]
    torch.testing.assert_close(over_reverse, expected, rtol=1e-5, atol=1e-5)

    def along(*points):
        return torch.func.jvp(lambda *x: function(*x).square().sum(), points, tuple(tangents))[1]

    torch.testing.assert_close(torch.autograd.grad(along(*leaves), leaves), tuple(expected), rtol=1e-5, atol=1e-5)
    twice = torch.func.jvp(along, tuple(inputs), tuple(tangents))[1]
    curvature = sum((t * h).sum() for t, h in zip(tangents, expected))
    torch.testing.assert_close(twice, curvature, rtol=1e-5, atol=1e-5)


@every
def test_jacobians(name):
    """torch.func.vmap over tangents, and torch.func.jvp over examples."""
    function, inputs, tangents = get(name)
    columns = torch.func.jacfwd(function)(*inputs)
    row = (columns.flatten(-inputs[0].dim()) * tangents[0].flatten()).sum(-1)
    torch.testing.assert_close(row, torch.func.jvp(lambda x: function(x, *inputs[1:]), (inputs[0],), (tangents[0],))[1])


@pytest.mark.parametrize("name", ["sinkhorn_divergence", "kl_gmm, sampled entropy", "gumbel_softmax, hard"])
def test_estimates_have_the_tangent_that_goes_with_their_gradient(name):
    function, inputs, tangents = get(name)
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    weights = draw(value.shape, seed=2)[0].detach()
    expected = sum((t * g).sum() for t, g in zip(tangents, torch.autograd.grad(value, leaves, weights)))
    tangent = torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]
    torch.testing.assert_close((weights * tangent).sum(), expected)


def test_the_gradient_of_sinkhorn_divergence_has_no_tangent():
    function, inputs, tangents = get("sinkhorn_divergence")
    leaves = [x.clone().requires_grad_() for x in inputs]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="sinkhorn_divergence has no second derivative"):
        gradients_of(function)(*dual(leaves, tangents))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_16_bits(backend, dtype):
    mu, logvar, dmu, dlogvar = (t.detach().to(dtype) for t in draw((3, 4), (3, 4), (3, 4), (3, 4)))
    exact = [t.double() for t in (mu, logvar, dmu, dlogvar)]
    with implementation(backend):
        _, tangent = torch.func.jvp(fastkl.kl_normal, (mu, logvar), (dmu, dlogvar))
    expected = (exact[0] * exact[2] + 0.5 * (exact[1].exp() - 1) * exact[3]).sum(1)
    assert tangent.dtype == torch.float32
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_mixture_that_is_only_expanded(requires_grad):
    means, logits, z, tangent = (t.detach() for t in draw((3, 4), (3,), (5, 4), (3, 4)))
    means.requires_grad_(requires_grad)

    def log_prob(means):
        return fastkl.gmm_log_prob(z, logits, (1 * means).expand(5, 3, 4))

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(log_prob(forward_ad.make_dual(means, tangent))).tangent
    torch.testing.assert_close(found.detach(), slope(log_prob, [means.detach()], [tangent]), rtol=1e-6, atol=1e-6)


def test_what_has_no_gradient_has_no_tangent():
    inputs, tangents = ([t.detach() for t in draw((3,), (3, 4), seed=seed)] for seed in (0, 1))
    with forward_ad.dual_level():
        logits, means = dual(inputs, tangents)
        z, _ = fastkl.sample_gmm(logits, means, num_samples=3, seed=1)
        kept = fastkl.remedies.balance_weights(means.square())
        moments = fastkl.gmm_moments(means, logits, means)
        assert all(forward_ad.unpack_dual(t).tangent is None for t in (z, kept, *moments))
    q = fastkl.DiagonalNormal(inputs[1], inputs[1])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='gradient="dreg" has no forward-mode'):
        fastkl.objectives.iwae(q, None, lambda z: z.sum(-1), num_samples=2, gradient="dreg")


def test_inside_a_compiled_function():
    """Never a wrong tangent: the frame runs eagerly, or fails with fullgraph=True."""
    (mu, logvar), (tangent, _) = ([t.detach() for t in draw((3, 4), (3, 4), seed=seed)] for seed in (0, 1))

    def along(mu, tangent):
        return torch.func.jvp(lambda m: fastkl.kl_normal(m, logvar), (mu,), (tangent,))[1]

    expected = (mu * tangent).sum(1)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"forward-mode derivatives inside torch\.compile|Observed exception"):
        torch.compile(along, backend="eager", fullgraph=True)(mu, tangent)
    torch.testing.assert_close(torch.compile(along, backend="eager")(mu, tangent), expected)
    compiled = torch.compile(lambda m: fastkl.kl_normal(m, logvar), backend="eager")
    compiled(mu)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(mu, tangent)))
    torch.testing.assert_close(found.tangent, expected)
    assert mu.device.type == DEVICE
