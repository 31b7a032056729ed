"""16-bit gradients of what rows share, and of what several terms share, are summed in float32 and rounded once.

The tolerance against float64 is one unit in the last place (half would do, but Triton's interpreter truncates). If
shares were rounded before the sum, a row's share would be subnormal in float16, and in bfloat16 the rounding errors of
shares with opposite signs would remain.
"""

import pytest
import torch
from torch import distributions as td
from torch.func import grad, vmap

import fastkl
from fastkl import remedies

from helpers import DEVICE, implementation

N, D, L = 128, 8, 2
DTYPES = (torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("backend", ["torch", "triton"])
every_way = pytest.mark.parametrize("backend", ["torch", "native", "triton"])
in_16_bits = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def values(dtype, **shapes):
    """Tensors whose rows are almost the same; float64, of numbers that the dtype has."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes.items():
        size = shape[-1] if shape else 1
        base = torch.rand(size, generator=generator) + 0.25
        found[name] = (base + 0.01 * torch.randn(shape or 1, generator=generator)).reshape(shape).to(dtype).double()
    return {name: value.to(DEVICE) for name, value in found.items()}


def weights(out, dtype):
    """Of rows in turn +1 and -1, and 1/64; in float16 so small that shares are subnormal numbers, or 0."""
    rows = out.shape[0] if out.dim() < 3 else out.shape[1]
    signs = 1.0 - 2.0 * (torch.arange(rows, device=out.device) % 2) + 2.0**-6
    shape = (rows,) if out.dim() == 1 else (rows, 1)
    small = 2.0**-14 if dtype == out.dtype else 2.0**-20
    return signs.view(shape).to(out.dtype) * (small if dtype == torch.float16 else 1.0)


def results(function, inputs):
    found = function(**inputs)
    return found if isinstance(found, tuple) else (found,)


def check(fused, formula, dtype, **shapes):
    """Of each result by itself, for the gradients of several ops are added up by torch, in their own dtype."""
    exact = {name: value.requires_grad_() for name, value in values(dtype, **shapes).items()}
    inputs = {name: value.detach().to(dtype).requires_grad_() for name, value in exact.items()}
    for out, truth in zip(results(fused, inputs), results(formula, exact), strict=True):
        weight = weights(out, dtype) if out.dim() else torch.tensor(2.0**-6, device=DEVICE)
        options = {"retain_graph": True, "allow_unused": True}
        found = torch.autograd.grad(out, inputs.values(), weight.expand(out.shape), **options)
        expected = torch.autograd.grad(truth, exact.values(), weight.double().expand(truth.shape), **options)
        for name, actual, wanted in zip(inputs, found, expected):
            if wanted is not None:
                assert_rounded_once(actual, wanted, dtype, name)


def assert_rounded_once(actual, exact, dtype, name):
    assert actual.dtype == dtype
    error, limits = (actual.double() - exact).abs(), torch.finfo(dtype)
    allowed = 1.05 * limits.eps * exact.abs().clamp(min=limits.tiny)
    worst = (error - allowed - 1e-5 * exact.abs().max()).max()
    assert worst <= 0, f"{name}: {(error / exact.abs()).max():.2e}"


def log_normal(x, mean, logvar):
    return td.Normal(mean, (logvar / 2).exp()).log_prob(x).sum(-1)


def kl(mu, logvar, prior_mu=None, prior_logvar=None):
    zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
    prior = td.Normal(
        zero if prior_mu is None else prior_mu, (zero if prior_logvar is None else prior_logvar / 2).exp()
    )
    return td.kl_divergence(td.Normal(mu, (logvar / 2).exp()), prior).expand(N, D).sum(-1)


def sample(mu, logvar, eps):
    return mu + (logvar / 2).exp() * eps


def sampled(mu, logvar, eps):
    return mu + (logvar / 2).exp() * eps


def posterior(mu, logvar):
    return fastkl.DiagonalNormal(mu, logvar, event_ndim=1)


def several(q, z, *prior):
    """What a posterior does that has one value for each datum."""
    return q.kl(*prior), q.rsample_kl(*prior, seed=1)[1], q.log_prob(z), q.entropy()


SHAPES = {
    "logvar of the event": {"mu": (N, D), "logvar": (D,)},
    "mu of the event, logvar of each row": {"mu": (1, D), "logvar": (N, 1)},
    "one mu": {"mu": (), "logvar": (N, D)},
}
broadcast = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)


@every_way
@in_16_bits
@broadcast
def test_samples_and_their_kl(backend, dtype, shapes):
    def fused(mu, logvar, eps):
        return fastkl.rsample_kl(mu, logvar, eps=eps)

    def of_posterior(mu, logvar, eps):
        return posterior(mu, logvar).rsample(eps=eps)

    with implementation(backend):
        check(fused, lambda mu, logvar, eps: (sampled(mu, logvar, eps), kl(mu, logvar)), dtype, **shapes, eps=(N, D))
        for op in (lambda mu, logvar, eps: fastkl.rsample_normal(mu, logvar, eps=eps), of_posterior):
            check(op, sampled, dtype, **shapes, eps=(N, D))


@every_way
@in_16_bits
def test_noise_that_samples_share(backend, dtype):
    with implementation(backend):
        for ndim, eps in ((None, (D,)), (L, (N, 1)), (L, (L, 1, D))):
            check(
                lambda mu, logvar, eps, n=ndim: fastkl.rsample_normal(mu, logvar, eps=eps, num_samples=n),
                lambda mu, logvar, eps, n=ndim: sampled(mu, logvar, eps).expand(*[n] * (n is not None), N, D),
                dtype, mu=(N, D), logvar=(D,), eps=eps,
            )  # fmt: skip


@every_way
@in_16_bits
@pytest.mark.parametrize("prior", [{"prior_mu": (), "prior_logvar": (1,)}, {"prior_mu": (N, 1)}], ids=str)
def test_priors(backend, dtype, prior):
    def rsample_kl(mu, logvar, **prior):
        return fastkl.rsample_kl(mu, logvar, **prior, seed=1)[1]

    def of_posteriors(mu, logvar, prior_mu, prior_logvar=None):
        prior = posterior(prior_mu, mu.new_zeros(D) if prior_logvar is None else prior_logvar)
        return several(posterior(mu, logvar), mu.new_zeros(N, D), prior)[:2]

    with implementation(backend):
        for op in (fastkl.kl_normal, rsample_kl):
            check(op, kl, dtype, mu=(N, D), logvar=(N, D), **prior)
        check(of_posteriors, lambda *a, **k: (kl(*a, **k),) * 2, dtype, mu=(N, D), logvar=(D,), **prior)


@every_way
@in_16_bits
@broadcast
def test_posteriors(backend, dtype, shapes):
    z = torch.full((N, D), 0.5, device=DEVICE, dtype=dtype)

    def truth(mu, logvar):
        entropy = td.Normal(mu, (logvar / 2).exp()).entropy().expand(N, D).sum(-1)
        return kl(mu, logvar), kl(mu, logvar), log_normal(z.double(), mu, logvar), entropy

    def free(mu, logvar):
        return remedies.free_bits(posterior(mu, logvar), 0.0, per="dimension")

    with implementation(backend):
        check(lambda mu, logvar: several(posterior(mu, logvar), z), truth, dtype, **shapes)
        check(free, kl, dtype, **shapes)


@every_way
@in_16_bits
@pytest.mark.parametrize("logvar", [(), (D,), (N, 1), (1, 1)], ids=str)
def test_likelihoods(backend, dtype, logvar):
    def bernoulli(x, logits):
        return (x * logits - torch.nn.functional.softplus(logits)).sum(-1)

    with implementation(backend):
        for shapes in ({"x": (N, D), "mean": (D,)}, {"x": (1, D), "mean": (N, 1)}):
            check(lambda **t: fastkl.normal_log_prob(**t, event_ndim=1), log_normal, dtype, **shapes, logvar=logvar)
            shapes = {"x": shapes["x"], "logits": shapes["mean"]}
            check(lambda **t: fastkl.bernoulli_log_prob(**t, event_ndim=1), bernoulli, dtype, **shapes)


@both
@in_16_bits
def test_samples_of_a_learned_prior(backend, dtype):
    prior = fastkl.priors.LearnedNormal(D).to(DEVICE)

    def fused(mu, logvar):
        prior._parameters.update(mu=mu, logvar=logvar)
        return prior.rsample(N, seed=1)

    eps = fused(torch.zeros(D, device=DEVICE), torch.zeros(D, device=DEVICE)).double()
    with implementation(backend):
        if dtype == torch.bfloat16:  # a sum over rows of noise, which is not that of the definition to the last digit
            check(fused, lambda mu, logvar: sampled(mu, logvar, eps), dtype, mu=(D,), logvar=(D,))
        check(lambda mu: fused(mu, torch.zeros_like(mu)), lambda mu: mu + eps, dtype, mu=(D,))


def mmd_of_posteriors(mu, logvar):
    def kernel(difference, variance):
        return sum(
            ((g / (g + variance)).sqrt() * (-0.5 * difference**2 / (g + variance)).exp()).prod(-1)
            for g in (D * scale for scale in fastkl.reference.MMD_SCALES)
        )

    variance = logvar.exp().expand(mu.shape)
    pairs = kernel(mu[:, None] - mu, variance[:, None] + variance)
    off_diagonal = (pairs.sum() - pairs.diagonal().sum()) / (len(mu) * (len(mu) - 1))
    return off_diagonal - 2 * kernel(mu, variance + 1).mean()


@both
def test_mmd_normal(backend):
    with implementation(backend):
        for logvar in ((24, D), (D,)):
            check(fastkl.mmd_normal, mmd_of_posteriors, torch.bfloat16, mu=(24, D), logvar=logvar)


MIXTURE = {"logits": (3,), "means": (3, D), "logvars": (3, D)}


def bound(method, mu, logvar, logits, means, logvars):
    if method == "lower":
        variances = logvars.exp() + logvar.exp().unsqueeze(-2)
        of_each = log_normal(mu.unsqueeze(-2), means, variances.log())
    else:
        components = td.Normal(means, (logvars / 2).exp())
        q = td.Normal(mu.unsqueeze(-2), (logvar / 2).exp().unsqueeze(-2))
        of_each = -td.kl_divergence(q, components).sum(-1)
    if method == "upper":
        return -(logits.log_softmax(-1) + of_each).logsumexp(-1)
    entropy = td.Normal(mu, (logvar / 2).exp()).entropy().expand(N, D).sum(-1)
    return -entropy - (logits.log_softmax(-1) + of_each).logsumexp(-1)


@both
@in_16_bits
@pytest.mark.parametrize("method", ["lower", "upper"])
@pytest.mark.parametrize("logvar", [(N, D), (D,)], ids=str)
def test_bounds_of_the_kl_to_a_mixture(backend, dtype, method, logvar):
    with implementation(backend):
        check(
            lambda **tensors: fastkl.kl_gmm(**tensors, method=method), lambda **tensors: bound(method, **tensors),
            dtype, mu=(N, D), logvar=logvar, **MIXTURE,
        )  # fmt: skip


@both
@in_16_bits
def test_relaxed_kl_to_a_mixture(backend, dtype):
    """Against itself in float64, which other tests hold to the definition: the noise of a seed is the same."""

    def relaxed(mu, logvar, **mixture):
        prior = fastkl.priors.GaussianMixture(3, D).to(DEVICE)
        prior._parameters.update(mixture)
        return prior.kl(posterior(mu, logvar), method="relaxed", tau=0.7, num_samples=2, seed=1)

    with implementation(backend):
        check(relaxed, relaxed, dtype, mu=(N, D), logvar=(D,), **MIXTURE)


@in_16_bits
def test_gradients_over_a_batch_of_functions(dtype):
    """vmap hands what the examples share to an op once for each of them."""
    x = torch.rand(N, D, device=DEVICE).to(dtype)
    scale = 2.0**-20 if dtype == torch.float16 else 1.0
    signs = scale * (1.0 - 2.0 * (torch.arange(N, device=DEVICE) % 2) + 2.0**-6)

    def loss(function, mean):
        return (signs.to(torch.double) * vmap(lambda x: function(x, mean))(x).double()).sum()

    def fused(x, mean):
        return fastkl.normal_log_prob(x, mean, torch.zeros_like(mean), event_ndim=1)

    def formula(x, mean):
        return -0.5 * (x.double() - mean).square().sum(-1)

    mean = torch.linspace(0.25, 1.0, D, device=DEVICE).to(dtype)
    actual = grad(lambda mean: loss(fused, mean))(mean)
    expected = grad(lambda mean: loss(formula, mean))(mean.double())
    assert_rounded_once(actual, expected, dtype, "mean")
