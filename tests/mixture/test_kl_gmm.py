"""kl_gmm: its bounds against quadrature, its samples against the definition, the gradients' variance."""

import math

import pytest
import torch

import fastkl
from fastkl import reference

from gmm_helpers import BACKENDS, draw, triangles
from helpers import DEVICE, DTYPES, implementation, launcher, leaf, peak_bytes

N, K, D = 6, 4, 3
# The kernels' float32 noise is that of the definition up to rounding.
NOISE = {"torch": {}, "native": {}, "triton": {"rtol": 1e-5, "atol": 1e-5}}


def posterior_and_mixture(n=N, k=K, d=D, dtype=torch.float64):
    return [
        draw(n, d, dtype=dtype), 0.5 * draw(n, d, seed=1, dtype=dtype), draw(k, seed=2, dtype=dtype),
        2 * draw(k, d, seed=3, dtype=dtype), 0.5 * draw(k, d, seed=4, dtype=dtype),
    ]  # fmt: skip


def quadrature(mu, logvar, logits, means, logvars):
    """KL by the midpoint rule over q's +-9 sigma, in one or two dimensions; log densities from torch.distributions."""
    d = mu.shape[-1]
    grid = torch.linspace(-9, 9, 4001 if d == 1 else 401, dtype=torch.float64, device=DEVICE)
    grid = torch.cartesian_prod(*[grid] * d).view(-1, d)
    components = torch.distributions.Independent(torch.distributions.Normal(means, torch.exp(0.5 * logvars)), 1)
    prior = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)
    values = []
    for m, v in zip(mu, logvar):
        log_q = (-0.5 * (grid**2 + math.log(2 * math.pi))).sum(-1)
        weight = torch.softmax(log_q, 0)
        log_q = log_q - 0.5 * v.sum()
        values.append((weight * (log_q - prior.log_prob(m + torch.exp(0.5 * v) * grid))).sum())
    return torch.stack(values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 2])
def test_lower_truth_upper_and_the_average_of_kls(backend, d):
    inputs = posterior_and_mixture(d=d)
    mu, logvar, logits, means, logvars = inputs
    truth = quadrature(*inputs)
    with implementation(backend):
        lower, upper = fastkl.kl_gmm_bounds(*inputs)
    each = fastkl.kl_normal(mu[:, None], logvar[:, None], means, logvars, event_ndim=1)
    average = (torch.softmax(logits, 0) * each).sum(-1)
    assert (lower < truth).all()
    assert (truth < upper).all()
    assert (upper < average).all()
    sampled = fastkl.kl_gmm(*inputs, num_samples=20000, seed=1)
    torch.testing.assert_close(sampled, truth, atol=0.03, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["mc", "upper", "lower"])
@pytest.mark.parametrize("covariance", ["diagonal", "spherical", "full"])
def test_the_definition(backend, method, covariance):
    inputs = posterior_and_mixture()
    options = {"method": method, "num_samples": 5, "seed": torch.tensor(3, device=DEVICE)}
    if covariance == "spherical":
        inputs[4] = inputs[4][:, :1]
    if covariance == "full":
        inputs[4] = triangles(K, size=D, seed=5)

    def call(function):
        def with_spread(mu, logvar, logits, means, spread):
            name = "scale_tril" if covariance == "full" else "logvars"
            return function(mu, logvar, logits, means, **{name: spread}, **options)

        return with_spread

    results = []
    for function in (fastkl.kl_gmm, reference.kl_gmm):
        leaves = [leaf(tensor) for tensor in inputs]
        with implementation(backend if function is fastkl.kl_gmm else "torch"):
            value = call(function)(*leaves)
            results.append((value, *torch.autograd.grad(value, leaves, torch.linspace(-1, 1, N).to(value))))
    torch.testing.assert_close(*results, **NOISE[backend])


SHAPES = {
    "samples of a batch": ((5, N, D), (N, D), (K,), (K, D), (K, D)),
    "weights for each datum": ((5, N, D), (5, N, D), (N, K), (K, D), (1, D)),
    "a mixture for each datum": ((5, N, D), (N, D), (N, K), (N, K, D), (K, D)),
    "one point": ((D,), (D,), (K,), (K, D), (K, 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{"num_samples": 3}, {"num_samples": 3, "gradient": "stl", "entropy": "sampled"}])
def test_shapes_and_estimators(backend, name, options):
    results = []
    for function in (fastkl.kl_gmm, reference.kl_gmm):
        leaves = [leaf(draw(*shape, seed=seed)) for seed, shape in enumerate(SHAPES[name])]
        with implementation(backend if function is fastkl.kl_gmm else "torch"):
            value = function(*leaves, seed=torch.tensor(2**40 + 3, device=DEVICE), **options)
            results.append((value, *torch.autograd.grad(value.square().sum(), leaves)))
    torch.testing.assert_close(*results, **NOISE[backend])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["mc", "upper", "lower"])
def test_dtypes(dtype, method):
    inputs = [leaf(tensor) for tensor in posterior_and_mixture(dtype=dtype)]
    seed = torch.tensor(3, device=DEVICE)
    value = fastkl.kl_gmm(*inputs, method=method, num_samples=2, seed=seed)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = reference.kl_gmm(*(tensor.double() for tensor in inputs), method=method, num_samples=2, seed=seed)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    assert {gradient.dtype for gradient in torch.autograd.grad(value.sum(), inputs)} == {dtype}


@pytest.mark.parametrize("method", ["mc", "upper", "lower"])
def test_one_component_is_the_gaussian_kl(method):
    mu, logvar, _, means, logvars = posterior_and_mixture(k=1)
    expected = fastkl.kl_normal(mu, logvar, means, logvars)
    samples = {"num_samples": 10000, "seed": 0} if method == "mc" else {}
    mixture = (torch.zeros(1, device=DEVICE), means, logvars)
    actual = fastkl.kl_gmm(mu, logvar, *mixture, method=method, **samples)
    if method == "lower":  # the product bound stays below even then: ln E[p] > E[ln p]
        assert (actual < expected).all()
    elif method == "upper":
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    else:
        z = fastkl.rsample_normal(mu, logvar, **samples)
        standard_error = fastkl.gmm_log_prob(z, *mixture).std(0) / 100
        assert ((actual - expected).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("method", ["upper", "lower"])
def test_symmetries_of_the_bounds(method):
    mu, logvar, logits, means, logvars = posterior_and_mixture()
    value = fastkl.kl_gmm(mu, logvar, logits, means, logvars, method=method)
    order = [2, 0, 3, 1]
    permuted = fastkl.kl_gmm(mu, logvar, logits[order], means[order], logvars[order], method=method)
    torch.testing.assert_close(permuted, value)
    torch.testing.assert_close(fastkl.kl_gmm(mu - 5, logvar, logits + 1, means - 5, logvars, method=method), value)
    wide = torch.cat([logits, torch.full((1,), -math.inf, dtype=logits.dtype, device=DEVICE)])
    more = [torch.cat([tensor, tensor[:1]]) for tensor in (means, logvars)]
    torch.testing.assert_close(fastkl.kl_gmm(mu, logvar, wide, *more, method=method), value)


def test_sampled_entropy_is_unbiased_and_exact_where_q_is_p():
    mu, logvar, *mixture = posterior_and_mixture()
    closed = fastkl.kl_gmm(mu, logvar, *mixture, num_samples=20000, seed=0)
    sampled = fastkl.kl_gmm(mu, logvar, *mixture, num_samples=20000, seed=0, entropy="sampled")
    assert not torch.equal(closed, sampled)
    torch.testing.assert_close(closed, sampled, rtol=0, atol=0.05)
    same = fastkl.kl_gmm(mu, logvar, torch.zeros(1).to(mu), mu[:, None], logvar[:, None], entropy="sampled", seed=1)
    torch.testing.assert_close(same, torch.zeros_like(same), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_three_estimators(backend):
    """Closed and sampled entropy have one gradient; sticking the landing has the same mean, and none where q = p."""
    mu, logvar, *mixture = posterior_and_mixture()

    def gradient(*prior, **options):
        leaves = [leaf(mu), leaf(logvar)]
        with implementation(backend):
            return torch.autograd.grad(fastkl.kl_gmm(*leaves, *prior, **options).sum(), leaves)

    few = {"num_samples": 3, "seed": 1}
    torch.testing.assert_close(gradient(*mixture, **few), gradient(*mixture, **few, entropy="sampled"))
    q_itself = (torch.zeros(1).to(mu), mu[:, None], logvar[:, None])
    for plain, stl in zip(gradient(*q_itself, **few), gradient(*q_itself, **few, gradient="stl")):
        assert plain.abs().min() > 1e-3
        torch.testing.assert_close(stl, torch.zeros_like(stl), rtol=0, atol=1e-12)
    if backend == "torch":
        many = {"num_samples": 20000, "seed": 1}
        plain, stl = gradient(*mixture, **many), gradient(*mixture, **many, gradient="stl")
        torch.testing.assert_close(plain, stl, rtol=0, atol=0.05)


def test_seeds():
    mu, logvar, *mixture = posterior_and_mixture()
    torch.manual_seed(0)
    first, second = (fastkl.kl_gmm(mu, logvar, *mixture) for _ in range(2))
    torch.manual_seed(0)
    again = fastkl.kl_gmm(mu, logvar, *mixture)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    z = fastkl.rsample_normal(mu, logvar, num_samples=4, seed=9)
    expected = -reference.normal_entropy(logvar) - fastkl.gmm_log_prob(z, *mixture).mean(0)
    torch.testing.assert_close(fastkl.kl_gmm(mu, logvar, *mixture, num_samples=4, seed=9), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="the closed form's memory")
def test_memory_does_not_depend_on_the_samples():
    leaves = [leaf(tensor) for tensor in posterior_and_mixture(100, 30, 100, dtype=torch.float32)]

    def run(num_samples):
        torch.autograd.grad(fastkl.kl_gmm(*leaves, num_samples=num_samples, seed=0).sum(), leaves)

    run(1)
    few, many = (peak_bytes(lambda count=count: run(count)) for count in (104, 1040))
    assert many < 1.05 * few
    assert many < 32 << 20  # 1040 samples alone are 40 MiB


def test_blocks_of_rows_draw_the_same_noise(monkeypatch):
    inputs = posterior_and_mixture(50, d=7)  # 7 a row: blocks begin inside a Philox call
    expected = fastkl.kl_gmm(*inputs, num_samples=3, seed=4)
    monkeypatch.setattr("fastkl.ops.mixture._kl_samples.SAMPLES_BYTES", 7 * 8 * 5)
    torch.testing.assert_close(fastkl.kl_gmm(*inputs, num_samples=3, seed=4), expected)


def aot_calls():
    samples, bwd = launcher("kl_gmm._samples"), launcher("kl_gmm.bwd")
    calls, seed = {}, torch.zeros((), dtype=torch.int64)

    def add(name, dtype, columns=64, stl=False):
        mu, means = torch.zeros(64, columns, dtype=dtype), torch.zeros(1, 8, columns, dtype=dtype)
        wide = reference.compute_dtype(mu)
        mixture, dkl = (torch.zeros(1, 8, dtype=dtype), means, None, None), torch.zeros(64, dtype=wide)
        calls[f"{name} samples"] = lambda: samples(mu, mu, seed, 0, 2, wide, with_eps=True)
        settings = (dkl, mu, mu, seed, *mixture, mu, mu, *[None] * 4, 2, "exact", stl)
        # The mixture's own kernels, too, which do not all move 16 bytes.
        calls[f"{name.replace('aligned', 'gradients')} bwd"] = lambda: bwd(*settings)

    add("core aligned", torch.float32)
    add("bfloat16, stl", torch.bfloat16, stl=True)
    add("odd, stl", torch.float32, 37, True)
    add("float64, stl", torch.float64, stl=True)
    return calls
