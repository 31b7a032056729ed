"""iwae, effective_sample_size, weight_entropy: compared with scipy, at the edges, and where other libraries fail."""

import math

import pytest
import torch

import fastkl
from fastkl import reference

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, leaf

special = Package("scipy.special")
stats = Package("scipy.stats")

INF = math.inf


def log_weights(*shape, scale=5.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("shape", "dim"), [((7, 5), 0), ((5, 7), 1), ((3, 7, 2), -2), ((7,), 0), ((1, 4), 0)], ids=str)
def test_values_and_gradient(shape, dim):
    log_w = leaf(log_weights(*shape))
    array = log_w.detach().cpu().numpy()
    count = shape[dim]
    weights = special.softmax(array, dim)
    expected = {
        fastkl.iwae: special.logsumexp(array, dim) - math.log(count),
        fastkl.effective_sample_size: 1 / (weights**2).sum(dim),
        fastkl.weight_entropy: stats.entropy(weights, axis=dim),
    }
    for function, values in expected.items():
        actual = function(log_w, dim)
        torch.testing.assert_close(actual.cpu(), torch.as_tensor(values))
    bound = fastkl.iwae(log_w, dim=dim)
    (gradient,) = torch.autograd.grad(bound.sum(), log_w)
    torch.testing.assert_close(gradient.cpu(), torch.as_tensor(weights))
    torch.testing.assert_close(reference.importance_weights(log_w, dim).cpu(), torch.as_tensor(weights))


@pytest.mark.parametrize("function", [fastkl.iwae, fastkl.effective_sample_size, fastkl.weight_entropy])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(function, dtype):
    log_w = leaf(log_weights(6, 50, dtype=dtype))
    value = function(log_w)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(value.sum(), log_w)
    assert gradient.dtype == dtype
    eager = torch.logsumexp(log_w.detach(), 0) - math.log(6) if function is fastkl.iwae else value.detach()
    exact = function(log_w.detach().double())
    assert_as_good_as_eager(value.detach(), eager, exact)
    if function is not fastkl.iwae:  # whose definition is the eager formula
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_zero(dtype):
    log_w = leaf(torch.tensor([[-INF, -INF, 2.0], [-INF, 3.0, -INF], [-INF, 3.0, 2.0]], dtype=dtype))
    value, ess, entropy = (f(log_w) for f in (fastkl.iwae, fastkl.effective_sample_size, fastkl.weight_entropy))
    torch.testing.assert_close(value[1:].double().cpu(), torch.tensor([3, 2.0]).double() + math.log(2 / 3))
    assert value[0] == -INF
    torch.testing.assert_close(ess.double().cpu(), torch.tensor([0, 2, 2.0]).double())
    torch.testing.assert_close(entropy.double().cpu(), torch.tensor([0, 1, 1.0]).double() * math.log(2))
    gradients = [
        torch.autograd.grad(x.sum(), log_w, retain_graph=True)[0].double().cpu() for x in (value, ess, entropy)
    ]
    torch.testing.assert_close(gradients[0], torch.tensor([[0, 0, 0.5], [0, 0.5, 0], [0, 0.5, 0.5]]).double())
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all((gradient[:, 0] == 0).all() for gradient in gradients)
    assert torch.logsumexp(log_w.detach().requires_grad_(), 0)[0] == -INF  # whose gradient is NaN


def test_size_of_the_weights_does_not_matter():
    """Log-weights of images are -1e4 nats and far apart: nothing over- or underflows, and nothing cancels."""
    log_w = log_weights(8, 20, scale=3.0, dtype=torch.float32)
    far = log_w - 2.0**17
    near = far + 2.0**17  # what is left of log_w at that size
    for function in (fastkl.effective_sample_size, fastkl.weight_entropy):
        assert torch.equal(function(far), function(near))
    torch.testing.assert_close(fastkl.iwae(far), fastkl.iwae(near) - 2.0**17, rtol=0, atol=2.0**-6)
    apart = torch.tensor([[0.0], [-2e4], [5e4]], device=DEVICE)
    assert fastkl.iwae(apart).item() == pytest.approx(5e4 - math.log(3))
    assert (fastkl.effective_sample_size(apart).item(), fastkl.weight_entropy(apart).item()) == (1, 0)
    equal = torch.full((9, 1), -1e5, device=DEVICE)
    assert fastkl.effective_sample_size(equal).item() == 9
    assert fastkl.weight_entropy(equal).item() == pytest.approx(math.log(9))


def test_one_sample_is_the_elbo():
    log_w = log_weights(1, 6)
    assert torch.equal(fastkl.iwae(log_w), log_w[0])
    assert torch.equal(fastkl.effective_sample_size(log_w), torch.ones_like(log_w[0]))


def test_bad_arguments_are_named():
    log_w = torch.zeros(3, 4)
    for function in (fastkl.iwae, fastkl.effective_sample_size, fastkl.weight_entropy):
        with pytest.raises(TypeError, match=r"log_w must be a torch\.Tensor, got list"):
            function([0.0])
        with pytest.raises(TypeError, match="log_w must be a floating-point tensor"):
            function(log_w.long())
        with pytest.raises(TypeError, match="dim must be an int, got float"):
            function(log_w, 0.0)
        with pytest.raises(ValueError, match="dim=2 is out of range for log_w, which has 2 dimensions"):
            function(log_w, 2)
        with pytest.raises(ValueError, match="dim=0 is out of range"):
            function(torch.tensor(1.0))
        with pytest.raises(ValueError, match=r"at least one sample along dim=1, got \(3, 0\)"):
            function(torch.zeros(3, 0), 1)
