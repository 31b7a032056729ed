"""scale= and prior_scale= give the parameterisation: values and gradients equal those with a log-variance."""

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as td
from torch.utils._python_dispatch import TorchDispatchMode

import fastkl
from fastkl.ops._scales import as_logvar

from helpers import DEVICE, implementation, leaf

N, K, D = 4, 3, 5
# What a log-variance is made of, written apart from fastkl.
LOGVAR = {
    "logvar": lambda t: t,
    "log_std": lambda t: 2 * t,
    "std": lambda t: 2 * t.log(),
    "softplus": lambda t: 2 * F.softplus(t).log(),
}
# op of (mu, logvar, the other Gaussian's mean and spread, settings), the name of the argument
PRIOR = {
    "kl_normal": fastkl.kl_normal,
    "kl_normal_per_dim": fastkl.kl_normal_per_dim,
    "rsample_kl": lambda *t, **s: fastkl.rsample_kl(*t, seed=1, **s)[1],
    "wasserstein2_normal": fastkl.wasserstein2_normal,
}
LOGITS = torch.linspace(-1, 1, K, dtype=torch.float64, device=DEVICE)
MIXTURE = {
    "gmm_log_prob": lambda z, m, v, **s: fastkl.gmm_log_prob(z, LOGITS, m, v, **s),
    "gmm_responsibilities": lambda z, m, v, **s: fastkl.gmm_responsibilities(z, LOGITS, m, v, **s),
    "rsample_gmm": lambda z, m, v, **s: fastkl.rsample_gmm(LOGITS, m, v, num_samples=N, seed=1, **s),
}
KL_GMM = {
    method: lambda z, m, v, scale, method=method: fastkl.kl_gmm(
        z, z, LOGITS, m, v, method=method, prior_scale=scale, seed=1 if method == "mc" else None
    )
    for method in ("mc", "upper", "lower")
}
KL_GMM["bounds"] = lambda z, m, v, scale: torch.stack(fastkl.kl_gmm_bounds(z, z, LOGITS, m, v, prior_scale=scale))


def _draw(*shape, positive=False):
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return leaf(drawn.exp() if positive else drawn)


def _same_as_logvar(op, tensors, spread, scale):
    """op(*tensors, spread of the kind `scale`) and its gradients, against the log-variance that it stands for."""
    found, expected = op(spread, scale), op(LOGVAR[scale](spread), "logvar")
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(v.sin().sum(), [*tensors, spread]) for v in (found, expected))):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", LOGVAR)
@pytest.mark.parametrize("op", PRIOR)
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("shape", [(N, D), (D,)], ids=["full", "shared"])
def test_a_prior_is_what_prior_scale_says(backend, op, scale, shape):
    tensors, spread = [_draw(N, D), _draw(N, D), _draw(*shape)], _draw(*shape, positive=scale == "std")
    with implementation(backend):
        _same_as_logvar(lambda s, kind: PRIOR[op](*tensors, s, prior_scale=kind), tensors, spread, scale)


@pytest.mark.parametrize("scale", LOGVAR)
@pytest.mark.parametrize("op", [*MIXTURE, *KL_GMM])
@pytest.mark.parametrize("shape", [(K, D), (K, 1), (D,)], ids=["diagonal", "spherical", "tied"])
def test_components_are_what_scale_says(op, scale, shape):
    z, means = _draw(N, D), _draw(K, D)
    spread = _draw(*shape, positive=scale == "std")
    if op in MIXTURE:
        tensors = [means] if op == "rsample_gmm" else [z, means]
        _same_as_logvar(lambda s, kind: MIXTURE[op](z, means, s, scale=kind), tensors, spread, scale)
    else:
        _same_as_logvar(lambda s, kind: KL_GMM[op](z, means, s, kind), [z, means], spread, scale)


# Ops of a batch: (mu, spread, settings), whose data are drawn apart.
BATCH = {
    "normal_log_prob": lambda m, v, **s: fastkl.normal_log_prob(_draw(N, D).detach(), m, v, **s),
    "mmd_normal": fastkl.mmd_normal,
    "total_correlation": lambda m, v, **s: torch.stack(fastkl.total_correlation(_draw(N, D).detach(), m, v, 99, **s)),
}


@pytest.mark.parametrize("scale", LOGVAR)
@pytest.mark.parametrize("op", BATCH)
@pytest.mark.parametrize("shape", [(N, D), (D,)], ids=["full", "shared"])
def test_the_spread_of_a_batch_is_what_scale_says(op, scale, shape):
    mu, spread = _draw(N, D), _draw(*shape, positive=scale == "std")
    _same_as_logvar(lambda s, kind: BATCH[op](mu, s, scale=kind), [mu], spread, scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_deviation_gives_the_densities_of_torch_distributions(dtype):
    x, mean = (_draw(N, D).detach().to(dtype) for _ in range(2))
    std = _draw(N, D, positive=True).detach().to(dtype)
    q = td.Normal(mean.double(), std.double()).log_prob(x.double()).sum(1)
    p = td.Normal(0.0, 1.0).log_prob(x.double()).sum(1)
    found = fastkl.normal_log_prob(x, mean, std, scale="std")
    torch.testing.assert_close(found.double(), q, rtol=1e-5, atol=1e-5)
    parts = fastkl.total_correlation(x, mean, std, 99, scale="std")
    torch.testing.assert_close(sum(parts).double(), q - p, rtol=1e-5, atol=1e-5)


def test_posteriors_without_spread_are_points():
    mu, std = _draw(N, D), leaf(torch.zeros(N, D, dtype=torch.float64))
    of_posteriors, of_points = fastkl.mmd_normal(mu, std, scale="std"), fastkl.mmd_normal(mu)
    torch.testing.assert_close(of_posteriors, of_points)
    found, dstd = torch.autograd.grad(of_posteriors, [mu, std])
    torch.testing.assert_close(found, *torch.autograd.grad(of_points, mu))
    assert torch.equal(dstd, torch.zeros_like(dstd))  # the distance is even in a deviation


@pytest.mark.parametrize("scale", LOGVAR)
def test_what_has_no_gradient_takes_a_scale_too(scale):
    z, means, spread = _draw(N, D).detach(), _draw(K, D).detach(), _draw(K, D, positive=scale == "std").detach()
    logvars = LOGVAR[scale](spread)
    for found, expected in zip(
        fastkl.gmm_moments(z, LOGITS, means, spread, scale=scale), fastkl.gmm_moments(z, LOGITS, means, logvars)
    ):
        torch.testing.assert_close(found, expected)
    settings = {"num_samples": 7, "seed": 1}
    found, _ = fastkl.sample_gmm(LOGITS, means, spread, scale=scale, **settings)
    torch.testing.assert_close(found, fastkl.sample_gmm(LOGITS, means, logvars, **settings)[0])


@pytest.mark.parametrize("scale", LOGVAR)
@pytest.mark.parametrize("method", ["mc", "upper", "lower"])
def test_the_posterior_of_kl_gmm_is_what_scale_says(method, scale):
    mu, means, spread = _draw(N, D), _draw(K, D), _draw(N, D, positive=scale == "std")

    def op(spread, kind):
        seed = 1 if method == "mc" else None
        bounds = fastkl.kl_gmm_bounds(mu, spread, LOGITS, means, scale=kind)
        return fastkl.kl_gmm(mu, spread, LOGITS, means, method=method, seed=seed, scale=kind) + sum(bounds)

    _same_as_logvar(op, [mu, means], spread, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_logarithm_of_a_16_bit_deviation_is_not_rounded(dtype):
    mu, logvar, prior_mu = (torch.randn(8, 64, device=DEVICE).to(dtype) for _ in range(3))
    std = torch.rand(64, device=DEVICE).add(0.5).to(dtype)
    p = td.Normal(prior_mu.double(), std.double().expand(8, 64))
    exact = td.kl_divergence(td.Normal(mu.double(), (logvar.double() / 2).exp()), p).sum(1)
    found = fastkl.kl_normal(mu, logvar, prior_mu, std, prior_scale="std")
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    log_prob = fastkl.gmm_log_prob(mu, torch.zeros(1, device=DEVICE), prior_mu[:1], std, scale="std")
    one = td.Normal(prior_mu[0].double(), std.double())
    torch.testing.assert_close(log_prob.double(), one.log_prob(mu.double()).sum(1), rtol=1e-5, atol=1e-4)
    z = fastkl.sample_gmm(torch.zeros(1, device=DEVICE), prior_mu[:1], std, scale="std", num_samples=2, seed=1)[0]
    assert z.dtype is dtype


def test_logarithm_of_an_expanded_tensor_is_taken_once():
    std = _draw(1, D, positive=True)
    expanded = (std * 1.0).expand(100, D)
    for tensor in (expanded, expanded.detach()):
        logvar = as_logvar("scale", tensor, "std")
        assert logvar.stride() == (0, 1)
        torch.testing.assert_close(logvar, 2 * expanded.log())
    (found,) = torch.autograd.grad(as_logvar("scale", expanded, "std").sum(), std)
    torch.testing.assert_close(found, 200 / std.detach())


def test_expanded_components_remain_one_mixture():
    """As in a plate of torch.distributions; nothing of the batch's size is allocated."""
    z, std = _draw(6, D), _draw(K, D, positive=True)
    plate = (std * 1.0).expand(6, K, D)
    means = _draw(K, D)
    found = fastkl.gmm_log_prob(z, LOGITS, means, plate, scale="std")
    torch.testing.assert_close(found, fastkl.gmm_log_prob(z, LOGITS, means, 2 * std.log()))
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), std, retain_graph=True)[0]
                                 for v in (found, fastkl.gmm_log_prob(z, LOGITS, means, 2 * std.log()))))  # fmt: skip


def test_a_number_is_a_deviation_of_all():
    mu, means = _draw(N, D), _draw(K, D)
    torch.testing.assert_close(
        fastkl.kl_normal(mu, 0.0, 0.0, 2.0, prior_scale="std"), fastkl.kl_normal(mu, 0.0, 0.0, torch.tensor(4.0).log())
    )
    expected = fastkl.gmm_log_prob(mu, LOGITS, means, torch.tensor([4.0], dtype=torch.float64).log())
    torch.testing.assert_close(fastkl.gmm_log_prob(mu, LOGITS, means, 2.0, scale="std"), expected)


def test_the_distance_to_a_point_has_a_gradient():
    mu, logvar, std = _draw(N, D), _draw(N, D), leaf(torch.zeros(N, D, dtype=torch.float64))
    distance = fastkl.wasserstein2_normal(mu, logvar, 0.0, std, prior_scale="std")
    torch.testing.assert_close(distance, (mu.square() + logvar.exp()).sum(1))
    (gradient,) = torch.autograd.grad(distance.sum(), std)
    torch.testing.assert_close(gradient, -2 * (logvar / 2).exp())


def test_a_gradient_that_overflows_is_infinite_and_not_nan():
    mu, prior = torch.full((1, 1), 10.0, device=DEVICE), leaf(torch.full((1, 1), -60.0))
    for q in (fastkl.DiagonalNormal(prior, prior, scale="softplus"), None):
        kl = fastkl.kl_normal(mu, mu, 0.0, prior, prior_scale="softplus") if q is None else -q.log_prob(mu)
        (gradient,) = torch.autograd.grad(kl.sum(), prior)
        assert gradient.item() == -float("inf")


def test_the_gradient_of_a_scale_has_gradients():
    mu, spread = _draw(2, D), _draw(2, D, positive=True)
    for scale in LOGVAR:
        op = lambda m, s: fastkl.kl_normal(m, 0.0, 0.0, s, prior_scale=scale)  # noqa: B023, E731
        assert torch.autograd.gradgradcheck(op, [mu, spread])
        tangents = torch.ones_like(mu), torch.ones_like(spread)
        _, moved = torch.func.jvp(op, (mu.detach(), spread.detach()), tangents)
        gradients = torch.autograd.grad(op(mu, spread).sum(), [mu, spread])
        torch.testing.assert_close(moved.sum(), sum(g.sum() for g in gradients))


def test_an_unknown_scale_is_named():
    mu, means = _draw(N, D), _draw(K, D)
    with pytest.raises(ValueError, match=r"prior_scale must be one of 'logvar'.*got 'sigma'"):
        fastkl.kl_normal(mu, mu, mu, mu, prior_scale="sigma")
    with pytest.raises(ValueError, match=r"^scale must be one of 'logvar'.*got 'sigma'"):
        fastkl.gmm_log_prob(mu, LOGITS, means, means, scale="sigma")
    with pytest.raises(ValueError, match=r"^prior_scale must be one of 'logvar'.*got 'sigma'"):
        fastkl.kl_gmm(mu, mu, LOGITS, means, means, prior_scale="sigma")
    with pytest.raises(ValueError, match=r"^scale must be one of 'logvar'.*got 'sigma'"):
        fastkl.kl_gmm(mu, mu, LOGITS, means, means, scale="sigma")
    for op in BATCH.values():
        with pytest.raises(ValueError, match=r"^scale must be one of 'logvar'.*got 'sigma'"):
            op(mu, mu, scale="sigma")
    with pytest.raises(ValueError, match=r"^scale must be one of"):
        fastkl.mmd_normal(mu, scale="sigma")


@pytest.mark.parametrize("op", ["kl_normal", "kl_normal_per_dim", "rsample_kl", "wasserstein2_normal"])
def test_an_unknown_prior_scale_is_refused_without_a_prior_too(op):
    with pytest.raises(ValueError, match="prior_scale must be one of"):
        getattr(fastkl, op)(torch.zeros(2, 3), torch.zeros(2, 3), prior_scale="variance")


def test_a_standard_deviation_is_converted_in_two_passes():
    """Its logarithm, doubled in place. The rest of the definition is for a derivative that the op has itself."""

    class Passes(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    std = torch.tensor([0.5, 0.0, math.inf])
    with Passes() as passes:
        logvar = as_logvar("scale", std, "std")
    assert passes.names == ["log", "mul_", "expand"]
    assert torch.equal(logvar, 2 * std.log())
