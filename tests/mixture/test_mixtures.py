"""Samples of Gaussian mixtures: distribution, gradients, the shapes of real code, and memory."""

import functools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastkl.ops.mixture import rsample_gmm as mixtures
from fastkl.ops.mixture.rsample_gmm import rsample_gmm, sample_gmm

from helpers import DEVICE, Package, implementation, leaf

stats = Package("scipy.stats")

SEED = 2**61 + 7
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def many(backend):
    """How many samples a distribution is tested with; interpreted kernels are slow."""
    return 1000 if backend == "triton" and DEVICE == "cpu" else 4000


def draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [leaf(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def tril(components, size, dtype=torch.float64):
    (factor,) = draw((components, size, size), dtype=dtype)
    return leaf(0.3 * factor.detach() + torch.eye(size, dtype=dtype, device=DEVICE))


def mixture(logits, means, logvars):
    """The one-dimensional distribution, for scipy."""
    weights, means = logits.detach().cpu().softmax(-1), means.detach().cpu().flatten()
    sigmas = torch.zeros(len(weights)).to(means) + (0.5 * logvars.detach().cpu().flatten()).exp()

    def cdf(x):
        return sum(w * stats.norm.cdf(x, m, s) for w, m, s in zip(weights.numpy(), means.numpy(), sigmas.numpy()))

    return cdf


@both
@pytest.mark.parametrize("spread", [(3, 1), (1, 1)], ids=["diagonal", "tied"])
def test_hard_relaxed_and_plain_samples_have_the_law_of_the_mixture(backend, spread):
    logits, means, logvars = draw((3,), (3, 1), spread)
    cdf, count = mixture(logits, 3 * means, logvars), many(backend)
    with implementation(backend):
        hard = rsample_gmm(logits, 3 * means, logvars, tau=0.5, hard=True, num_samples=count, seed=SEED)
        cold = rsample_gmm(logits, 3 * means, logvars, tau=1e-3, num_samples=count, seed=SEED)
        plain, component = sample_gmm(logits, 3 * means, logvars, num_samples=count, seed=SEED)
    for z in (hard, cold, plain):
        assert z.shape == (count, 1)
        assert stats.kstest(z.detach().cpu().flatten().numpy(), cdf).pvalue > 1e-3
    expected = count * logits.detach().softmax(-1).cpu()
    assert stats.chisquare(torch.bincount(component.cpu(), minlength=3).numpy(), expected.numpy()).pvalue > 1e-3


@both
def test_the_choice_and_the_noise_are_independent(backend):
    """One seed gives both; they must not be the same words."""
    zeros, count = torch.zeros(2, 1, device=DEVICE), many(backend)
    with implementation(backend):
        for logits in (torch.zeros(2, device=DEVICE), torch.zeros(count, 2, device=DEVICE)):
            samples = count if logits.dim() == 1 else 1
            shifted = torch.tensor([[0.0], [1000.0]], device=DEVICE)
            z = rsample_gmm(logits, shifted, tau=1.0, hard=True, num_samples=samples, seed=SEED).flatten()
            chosen = (z > 500).double()
            assert abs(torch.corrcoef(torch.stack([chosen, z.double() - 1000 * chosen]))[0, 1]) < 5 / math.sqrt(count)
            z, component = sample_gmm(logits, zeros, num_samples=samples, seed=SEED)
            both = torch.stack([component.flatten().double(), z.flatten().double()])
            assert abs(torch.corrcoef(both)[0, 1]) < 5 / math.sqrt(count)


@both
def test_full_covariance(backend):
    logits, means = draw((2,), (2, 3), dtype=torch.float32)
    factor = tril(2, 3, torch.float32)
    lower, count = factor.detach().tril(), 5 * many(backend)
    mean, covariance = 8.5 / count**0.5, 17 / count**0.5
    with implementation(backend):
        relaxed = rsample_gmm(logits, means, scale_tril=factor, hard=True, tau=1.0, num_samples=count, seed=SEED)
        plain, component = sample_gmm(logits, means, scale_tril=factor, num_samples=count, seed=SEED)
    for k in range(2):
        rows = plain[component == k]
        torch.testing.assert_close(rows.mean(0), means[k], rtol=0, atol=mean)
        torch.testing.assert_close(rows.T.cov(), lower[k] @ lower[k].mT, rtol=0, atol=covariance)
    torch.testing.assert_close(relaxed.mean(0), plain.mean(0), rtol=0, atol=mean)
    torch.testing.assert_close(relaxed.T.cov(), plain.T.cov(), rtol=0, atol=covariance)


@pytest.mark.parametrize("spread", [(4, 3), (4, 1), (1, 3), (3,), None, "full"], ids=str)
def test_gradients(spread):
    logits, means, tau = *draw((4,), (4, 3)), leaf(torch.tensor(0.7, dtype=torch.float64))
    extra = [] if spread is None else [tril(4, 3)] if spread == "full" else draw(spread)

    def function(logits, means, tau, *extra):
        named = {"scale_tril": extra[0]} if spread == "full" else {"logvars": extra[0]} if extra else {}
        return rsample_gmm(logits, means, **named, tau=tau, num_samples=2, seed=SEED)

    assert gradcheck(function, (logits, means, tau, *extra))
    assert gradgradcheck(function, (logits, means, tau, *extra))


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize(
    "shapes",
    [
        [(6, 4), (4, 3), (4, 3)],  # weights of each datum's own
        [(4,), (6, 4, 3), (4, 1)],  # means of each datum's own
        [(6, 4), (6, 4, 3), (6, 4, 3)],
        [(6, 4), (1, 4, 3), (1, 3)],
        [(2, 6, 4), (6, 4, 3), (2, 1, 1, 3)],
    ],
    ids=str,
)
def test_one_mixture_per_datum(shapes, num_samples):
    """Each datum by itself, at tau = 0 and next to no noise, is one of its means."""
    logits, means, logvars = draw(*shapes)
    batch = torch.broadcast_shapes(logits.shape[:-1], means.shape[:-2])
    cold = leaf(logvars.detach() - 40)
    z = rsample_gmm(logits, means, cold, tau=0.0, num_samples=num_samples, seed=SEED)
    assert z.shape == ((*batch, 3) if num_samples is None else (2, *batch, 3))
    distance = (z.unsqueeze(-2) - means).abs().amax(-1)
    assert distance.amin(-1).max() < 1e-6
    plain, component = sample_gmm(logits, means, cold, num_samples=5, seed=SEED)
    assert plain.shape == (5, *batch, 3)
    assert component.shape == (5, *batch)
    chosen = means.expand(5, *batch, 4, 3).gather(-2, component[..., None, None].expand(5, *batch, 1, 3)).squeeze(-2)
    torch.testing.assert_close(plain, chosen, rtol=0, atol=1e-6)
    function = functools.partial(rsample_gmm, tau=0.7, num_samples=num_samples, seed=SEED)
    assert gradcheck(function, (logits, means, logvars))
    # Components expanded over the batch are those of the batch.
    same = rsample_gmm(logits, means[..., :1, :, :].expand(means.shape), logvars, tau=0.7, seed=SEED) \
        if means.dim() > 2 else None  # fmt: skip
    if same is not None:
        shared = rsample_gmm(logits.expand(*batch, 4), means.select(-3, 0), logvars, tau=0.7, seed=SEED)
        torch.testing.assert_close(same, shared)


def test_full_covariance_per_datum():
    logits, means = draw((5, 2), (5, 2, 3))
    factor = leaf(tril(2, 3).detach().expand(5, 2, 3, 3) + 0.1 * torch.arange(5.0)[:, None, None, None].to(DEVICE))
    function = functools.partial(rsample_gmm, tau=0.7, seed=SEED)
    one = function(logits, means, scale_tril=factor)
    assert gradcheck(lambda a, b, c: function(a, b, scale_tril=c), (logits, means, factor))
    assert sample_gmm(logits, means, scale_tril=factor, num_samples=4)[0].shape == (4, 5, 3)
    with pytest.MonkeyPatch.context() as patch:  # block by block: the same
        patch.setattr(mixtures, "CHUNK", 1)
        torch.testing.assert_close(function(logits, means, scale_tril=factor), one)
        shared = rsample_gmm(logits, means, scale_tril=factor[0], seed=SEED)
        gradient = torch.autograd.grad(shared.square().sum(), (logits, means, factor))
    whole = rsample_gmm(logits, means, scale_tril=factor[0], seed=SEED)
    torch.testing.assert_close(shared, whole)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.square().sum(), (logits, means, factor)))


def test_zero_weights_are_never_drawn_and_leave_no_nan():
    (means, logvars), logits = draw((5, 2), (5, 2)), torch.tensor([-math.inf, 0.0, -math.inf, 1.0, -math.inf])
    logits = leaf(logits.double())
    _, component = sample_gmm(logits, means, logvars, num_samples=20_000, seed=SEED)
    assert component.unique().tolist() == [1, 3]
    for tau in (1.0, 0.0):
        z = rsample_gmm(logits, means, logvars, tau=tau, num_samples=50, seed=SEED)
        gradients = torch.autograd.grad(z.square().sum(), (logits, means, logvars))
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all((gradient[[0, 2, 4]] == 0).all() for gradient in gradients)
    nothing = rsample_gmm(torch.full_like(logits, -math.inf), means, logvars, seed=SEED)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(nothing.sum(), (means, logvars)))


@pytest.mark.parametrize("spread", [(1, 3), None, "full"], ids=str)
def test_one_component_leaves_no_parameter_without_gradient(spread):
    """DistributedDataParallel takes a parameter whose gradient is None for unused, and stops."""
    logits, means = draw((1,), (1, 3))
    named = {} if spread is None else {"scale_tril": tril(1, 3)} if spread == "full" else {"logvars": draw(spread)[0]}
    z = rsample_gmm(logits, means, **named, num_samples=2, seed=SEED)
    gradients = torch.autograd.grad(z.sum(), (logits, means, *named.values()))
    assert gradients[0].tolist() == [0.0]
    assert gradients[1].tolist() == [[2.0, 2.0, 2.0]]


class Largest(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operation created."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def test_no_tensor_of_samples_by_components_by_dimensions():
    n, k, d = 256, 64, 32
    logits, means, logvars = draw((n, k), (k, d), (k, d), dtype=torch.float32)
    with Largest() as largest:
        rsample_gmm(logits, means, logvars, seed=SEED).sum().backward()
    assert largest.elements <= n * k
    weights = logits[0].clone()
    with Largest() as largest:  # and none of samples by components
        sample_gmm(weights, means, logvars, num_samples=n, seed=SEED)
    assert largest.elements <= max(n, k) * d
    wide = [tensor.detach() for tensor in draw((65536,), (65536, 4), dtype=torch.float32)]
    assert sample_gmm(*wide, num_samples=100, seed=SEED)[0].shape == (100, 4)
    long = [tensor.detach() for tensor in draw((8,), (8, 4096), dtype=torch.float32)]
    assert sample_gmm(*long, num_samples=100, seed=SEED)[0].isfinite().all()


def test_dtypes_autocast_and_seeds():
    logits, means, logvars = draw((3,), (3, 4), (3, 4), dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert rsample_gmm(logits, means.to(dtype), seed=SEED).dtype == dtype
        assert sample_gmm(logits, means.to(dtype), num_samples=2)[0].dtype == dtype
    expected = rsample_gmm(logits, means, logvars, seed=SEED)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(rsample_gmm(logits, means, logvars, seed=SEED), expected, rtol=0, atol=0)
    compiled = torch.compile(rsample_gmm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, means, logvars, seed=SEED), expected)
    torch.manual_seed(3)
    first = rsample_gmm(logits, means), sample_gmm(logits, means, num_samples=3)
    torch.manual_seed(3)
    again = rsample_gmm(logits, means), sample_gmm(logits, means, num_samples=3)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"logvars": torch.zeros(3, 4), "scale_tril": torch.zeros(3, 4, 4)}, ValueError, "exclude each other"),
        ({"logits": torch.zeros(2)}, ValueError, "logits must be"),
        ({"logits": torch.zeros(())}, ValueError, "logits must be"),
        ({"means": torch.zeros(3)}, ValueError, "means must be"),
        ({"logvars": torch.zeros(2, 4)}, ValueError, "logvars must be"),
        ({"logvars": torch.zeros(3, 3)}, ValueError, "logvars must be"),
        ({"scale_tril": torch.zeros(3, 4, 3)}, ValueError, "scale_tril must be"),
        ({"logits": torch.zeros(5, 3), "means": torch.zeros(6, 3, 4)}, ValueError, "do not broadcast"),
        ({"num_samples": 0}, ValueError, "num_samples"),
        ({"num_samples": 1.5}, TypeError, "num_samples"),
        ({"means": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "means"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_errors(settings, error, words):
    settings = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in settings.items()
    }
    given = {"logits": torch.zeros(3, device=DEVICE), "means": torch.zeros(3, 4, device=DEVICE), "num_samples": 2}
    for function in (rsample_gmm, sample_gmm):
        with pytest.raises(error, match=words):
            function(**given | settings)
