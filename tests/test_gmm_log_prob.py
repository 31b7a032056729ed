"""gmm_log_prob against other libraries' mixtures, its properties, its accuracy and what memory it takes."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from sklearn.mixture import GaussianMixture
from torch import distributions

import fastkl
from fastkl import reference
from fastkl.ops import _gmm, _mixture

from helpers import DEVICE, assert_as_good_as_eager, implementation, leaf, peak_bytes

N, K, D = 11, 5, 3
COVARIANCES = {"diagonal": (K, D), "spherical": (K, 1), "tied": (1, D), "one for each dimension": (D,), "unit": None}
BACKENDS = ("torch", "triton")
MIB = 1 << 20


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).to(DEVICE)


def triangles(*batch, size=D, seed=3):
    lower = 0.4 * draw(*batch, size, size, seed=seed).tril(-1)
    return lower + torch.diag_embed(0.5 + draw(*batch, size, seed=seed + 1).abs())


def same_family(z, logits, means, logvars):
    components = distributions.Independent(distributions.Normal(means, torch.exp(0.5 * logvars)), 1)
    weights = distributions.Categorical(logits=logits)
    return distributions.MixtureSameFamily(weights, components).log_prob(z)


def gradients(function, *inputs, weights=None):
    leaves = [leaf(tensor) for tensor in inputs]
    value = function(*leaves)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=DEVICE).view(value.shape)
    return value.detach(), torch.autograd.grad(value, leaves, weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_torch_distributions(backend, covariance):
    shape = COVARIANCES[covariance]
    inputs = [draw(N, D), draw(K, seed=1), draw(K, D, seed=2), *([] if shape is None else [draw(*shape, seed=3)])]

    def oracle(z, logits, means, logvars=None):
        logvars = means.new_zeros(()) if logvars is None else logvars
        return same_family(z, logits, means, logvars.expand(K, D))

    with implementation(backend):
        actual, dactual = gradients(fastkl.gmm_log_prob, *inputs)
    expected, dexpected = gradients(oracle, *inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dactual, dexpected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_covariance_by_scipy(backend):
    z, logits, means, tril = draw(N, D), draw(K, seed=1), draw(K, D, seed=2), triangles(K)
    with implementation(backend):
        actual = fastkl.gmm_log_prob(z, logits, means, scale_tril=tril)
        noise = 7 * torch.ones_like(tril).triu(1)  # above the diagonal, which is not read
        torch.testing.assert_close(fastkl.gmm_log_prob(z, logits, means, scale_tril=tril + noise), actual)
    weights = scipy.special.log_softmax(logits.cpu().numpy())
    covariances = (tril @ tril.mT).cpu().numpy()
    parts = [
        scipy.stats.multivariate_normal.logpdf(z.cpu(), mean, covariance)
        for mean, covariance in zip(means.cpu().numpy(), covariances)
    ]
    expected = scipy.special.logsumexp(np.stack(parts, 1) + weights, axis=1)
    np.testing.assert_allclose(actual.cpu(), expected, rtol=1e-10)


@pytest.mark.parametrize("covariance", ["diag", "spherical", "tied", "full"])
def test_scikit_learn_scores(covariance):
    z = draw(200, D).cpu().numpy()
    model = GaussianMixture(4, covariance_type=covariance, random_state=0, max_iter=5, tol=0).fit(z)
    parts = {"logits": np.log(model.weights_), "means": model.means_}
    if covariance in ("tied", "full"):
        tril = np.linalg.cholesky(np.broadcast_to(model.covariances_, (4, D, D)))
        parts["scale_tril"] = tril
    else:
        parts["logvars"] = np.log(model.covariances_).reshape(4, -1)
    parts = {name: torch.as_tensor(value, device=DEVICE) for name, value in parts.items()}
    data = torch.as_tensor(z, device=DEVICE)
    np.testing.assert_allclose(fastkl.gmm_log_prob(data, **parts).cpu(), model.score_samples(z), rtol=1e-10)
    responsibilities = fastkl.gmm_responsibilities(data, **parts).exp().cpu()
    np.testing.assert_allclose(responsibilities, model.predict_proba(z), atol=1e-12)


SHAPES = {  # z, logits, means, logvars or scale_tril
    "samples of a batch": ((4, N, D), (K,), (K, D), (K, D)),
    "weights for each datum": ((4, N, D), (N, K), (K, D), (K, D)),
    "weights for each sample": ((4, N, D), (4, N, K), (K, D), (K, 1)),
    "a mixture for each datum": ((4, N, D), (N, K), (N, K, D), (N, K, D)),
    "components for each datum, shared weights": ((N, D), (K,), (N, K, D), (1, D)),
    "variances for each datum": ((N, D), (K,), (K, D), (N, K, D)),
    "a mixture for each datum, weights for each sample": ((4, N, D), (4, N, K), (N, K, D), (K, D)),
    "one point, many mixtures": ((D,), (N, K), (N, K, D), (N, K, 1)),
    "one point": ((D,), (K,), (K, D), (K, D)),
    "a grid of points and mixtures": ((4, 1, D), (K,), (N, K, D), (K, D)),
    "triangles": ((4, N, D), (N, K), (K, D), "shared"),
    "triangles for each datum": ((4, N, D), (K,), (N, K, D), "each"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_real_code_has(backend, name):
    *shapes, last = SHAPES[name]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    full = isinstance(last, str)
    if full:
        inputs.append(triangles(*((N, K) if last == "each" else (K,))))
    else:
        inputs.append(draw(*last, seed=9))

    def call(function):
        return lambda z, logits, means, spread: function(
            z, logits, means, **({"scale_tril": spread} if full else {"logvars": spread})
        )

    for op in ("gmm_log_prob", "gmm_responsibilities"):
        with implementation(backend):
            actual, dactual = gradients(call(getattr(fastkl, op)), *inputs)
        expected, dexpected = gradients(call(getattr(reference, op)), *inputs)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(dactual, dexpected)


def test_plates_are_collapsed_not_copied():
    """Components expanded over the batch: one mixture, in memory as in gradients."""
    n, k, d = 2000, 64, 32
    means, logvars = leaf(draw(k, d, dtype=torch.float32)), leaf(draw(k, d, seed=1, dtype=torch.float32))
    z, logits = draw(n, d, seed=2, dtype=torch.float32), draw(k, seed=3, dtype=torch.float32)
    results = []

    def run(*plate):
        expanded = (tensor.expand(*plate, k, d) if plate else tensor for tensor in (means, logvars))
        value = fastkl.gmm_log_prob(z, logits.expand(*plate, k) if plate else logits, *expanded)
        results.append((value, *torch.autograd.grad(value.sum(), (means, logvars))))

    run()
    for plate in ((n,), (1, n)):
        if DEVICE == "cpu":
            assert peak_bytes(lambda plate=plate: run(*plate)) < 32 * MIB  # one [n, k, d] is 16 MiB, autograd makes six
        else:
            run(*plate)
        for actual, expected in zip(results[-1], results[0]):
            torch.testing.assert_close(actual, expected.expand_as(actual))
    direct = leaf(means.detach().expand(n, k, d))  # whose own gradient is asked for: one for each datum
    gradient = torch.autograd.grad(fastkl.gmm_log_prob(z, logits, direct, logvars).sum(), direct)[0]
    torch.testing.assert_close(gradient.sum(0), results[0][1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(gradient[0], gradient[1])


# name -> (z, logits, means, logvars) in float64; all are rounded to the dtype before the reference sees them
EXTREMES = {
    "ordinary": lambda: (draw(40, 16), draw(20, seed=1), draw(20, 16, seed=2), draw(20, 16, seed=3, scale=0.5)),
    "narrow, means at 10": lambda: narrow(10.0, 0.1),
    "narrow, means at 100": lambda: narrow(100.0, 0.1),
    "very narrow, means at 10": lambda: narrow(10.0, 1e-3),
    "so narrow that even float64 cannot expand": lambda: narrow(10.0, 1e-5),
    "a shift of 1000": lambda: tuple(
        tensor + shift for tensor, shift in zip(EXTREMES["ordinary"](), (1000, 0, 1000, 0))
    ),
}


def narrow(distance, sigma):
    means = distance * draw(20, 16, seed=2).sign() + draw(20, 16, seed=5)
    near = means[torch.arange(40, device=DEVICE) % 20] + sigma * draw(40, 16)
    return near, draw(20, seed=1), means, torch.full((20, 1), 2 * np.log(sigma), dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [True, False])
def test_as_exact_as_differences(monkeypatch, name, dtype, small):
    """The contract of every op, on a CPU's expansion as well: no worse than broadcasting in the same dtype."""
    monkeypatch.setattr(_gmm, "SMALL", _gmm.SMALL if small else 0)
    inputs = [tensor.to(dtype) for tensor in EXTREMES[name]()]
    expected, dexpected = gradients(reference.gmm_log_prob, *(tensor.double() for tensor in inputs))
    eager, deager = gradients(reference.gmm_log_prob, *inputs)
    actual, dactual = gradients(fastkl.gmm_log_prob, *inputs)
    assert actual.dtype == torch.float32
    assert_as_good_as_eager(actual, eager, expected)
    for gradient, own, truth in zip(dactual, deager, dexpected):
        assert gradient.dtype == dtype
        # Sums over the batch of terms that cancel: rounding is relative to the largest.
        assert_as_good_as_eager(
            gradient, own, truth, scale=truth.abs().max(), units=64 if dtype == torch.float32 else 4
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_and_distant_within_a_ten_thousandth_nat(backend):
    inputs = [tensor.float() for tensor in narrow(10.0, 0.1)]
    expected = reference.gmm_log_prob(*(tensor.double() for tensor in inputs))
    with implementation(backend):
        actual = fastkl.gmm_log_prob(*inputs)
    assert (actual.double() - expected).abs().max() < 1e-4


@pytest.mark.skipif(DEVICE != "cpu", reason="the closed form's expansion")
def test_the_float32_expansion_is_worse_by_far(monkeypatch):
    """Known defect of |z|^2 - 2 z m + |m|^2 in float32, which precision="tf32x3" and "tf32" allow."""
    monkeypatch.setattr(_gmm, "SMALL", 0)  # tensors that are made at once have no expansion
    inputs = [tensor.float() for tensor in narrow(10.0, 0.1)]
    expected = reference.gmm_log_prob(*(tensor.double() for tensor in inputs))
    error = {
        precision: (fastkl.gmm_log_prob(*inputs, precision=precision).double() - expected).abs().max().item()
        for precision in ("exact", "tf32x3", "tf32")
    }
    assert error["exact"] < 1e-4
    assert 1e-3 < error["tf32x3"] < 1
    assert error["tf32"] >= error["tf32x3"] / 2


@pytest.mark.parametrize("backend", [*BACKENDS, "torch, in blocks"])
def test_a_component_of_weight_zero_is_not_there(monkeypatch, backend):
    if "blocks" in backend:
        monkeypatch.setattr(_gmm, "SMALL", 0)
        backend = "torch"
    z, logits, means, logvars = draw(N, D), draw(K, seed=1), draw(K, D, seed=2), draw(K, D, seed=3)
    without = [tensor[[0, 1, 3, 4]] for tensor in (logits, means, logvars)]
    logits[2] = float("-inf")
    with implementation(backend):
        actual, dactual = gradients(fastkl.gmm_log_prob, z, logits, means, logvars)
        expected, dexpected = gradients(fastkl.gmm_log_prob, z, *without)
        log_r = fastkl.gmm_responsibilities(z, logits, means, logvars)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(dactual[0], dexpected[0])
    for gradient, smaller in zip(dactual[1:], dexpected[1:]):
        assert (gradient[2] == 0).all()
        torch.testing.assert_close(gradient[[0, 1, 3, 4]], smaller)
    assert (log_r[:, 2] == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e3, 1e5, 1e8])  # |ln p| of 1e6, 1e10, 1e16
def test_rows_far_from_every_component(backend, distance):
    """Every density underflows; ln p is so large that its rounding alone would spoil exp(joint - ln p)."""
    z = torch.full((2, D), distance, dtype=torch.float32, device=DEVICE)
    z[1] *= -1
    logits, means = draw(K, seed=1, dtype=torch.float32), draw(K, D, seed=2, dtype=torch.float32)
    means[1] = means[0]  # two components that share every row
    logvars = draw(1, D, seed=3, scale=0.1, dtype=torch.float32)
    expected, dexpected = gradients(reference.gmm_log_prob, *(t.double() for t in (z, logits, means, logvars)))
    with implementation(backend):
        actual, dactual = gradients(fastkl.gmm_log_prob, z, logits, means, logvars)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    assert all(gradient.isfinite().all() for gradient in dactual)
    if distance > 1e6:  # where float64 has no digits left for the responsibilities of those that tie
        return
    # dz = -sum_k r_k (z - m_k) / S_k, and the responsibilities sum to 1.
    torch.testing.assert_close(dactual[0].double(), dexpected[0], rtol=1e-4, atol=0)
    total = dactual[2].double().sum(0)
    torch.testing.assert_close(total, dexpected[2].sum(0), rtol=1e-4, atol=1e-4 * dexpected[2].abs().max().item())


@pytest.mark.parametrize("size", [(200000, 2, 1), (20000, 4, 2)], ids=str)
def test_sums_over_many_rows(size):
    """Narrow products add rows up one by one: in float32 that loses three digits of the parameters' gradients."""
    n, k, d = size
    inputs = [draw(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate([(n, d), (k,), (k, d), (k, d)])]
    results = []
    for function, dtype in ((reference.gmm_log_prob, torch.float64), (fastkl.gmm_log_prob, torch.float32)):
        leaves = [leaf(tensor.to(dtype)) for tensor in inputs]
        results.append(torch.autograd.grad(function(*leaves).mean(), leaves))
    for truth, gradient in zip(*results):
        assert (gradient.double() - truth).abs().max() < 1e-5 * truth.abs().max()


def test_compiled_gradients_of_rows_far_away():
    """A compiled graph keeps ln p instead of responsibilities."""
    inputs = [
        leaf(tensor)
        for tensor in (
            draw(6, 4, dtype=torch.float32) + 3000,
            *(draw(*shape, seed=1, dtype=torch.float32) for shape in ((3,), (3, 4), (3, 4))),
        )
    ]
    compiled = torch.compile(fastkl.gmm_log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs).sum(), inputs),
        torch.autograd.grad(fastkl.gmm_log_prob(*inputs).sum(), inputs),
    )


def test_symmetries():
    z, logits, means, logvars = EXTREMES["ordinary"]()
    value = fastkl.gmm_log_prob(z, logits, means, logvars)
    order = torch.randperm(20)
    torch.testing.assert_close(fastkl.gmm_log_prob(z, logits[order], means[order], logvars[order]), value)
    torch.testing.assert_close(fastkl.gmm_log_prob(z + 3, logits, means + 3, logvars), value)
    torch.testing.assert_close(fastkl.gmm_log_prob(z, logits + 100, means, logvars), value)
    one = fastkl.gmm_log_prob(z, logits[:1], means[:1], logvars[:1])
    torch.testing.assert_close(one, fastkl.normal_log_prob(z, means[:1], logvars[:1]))
    responsibilities = fastkl.gmm_responsibilities(z, logits, means, logvars)
    torch.testing.assert_close(responsibilities.exp().sum(-1), torch.ones_like(value))


def test_moments_are_one_step_of_em():
    z, logits, means, logvars = EXTREMES["ordinary"]()
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


# (N, K, D), whether weights are kept for backward; the last two are cut into several slices of components
SIZES = {
    (4096, 500, 40): True,
    (2048, 1000, 256): True,
    (20000, 700, 4): False,
    (600, 20000, 40): False,
    (8, 30, 50000): True,
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the closed form's memory")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_memory_is_bounded_whatever_the_sizes(size):
    """Forward and backward allocate at most 32 MiB beyond inputs, gradients and a few values for each row."""
    n, k, d = size
    inputs = [
        leaf(draw(*shape, seed=seed, dtype=torch.float32)) for seed, shape in enumerate([(n, d), (k,), (k, d), (k, d)])
    ]
    results = sum(tensor.nbytes for tensor in inputs)
    used = peak_bytes(lambda: torch.autograd.grad(fastkl.gmm_log_prob(*inputs).sum(), inputs))
    assert used < results + 32 * MIB + 64 * n
    assert _mixture.keep_for(inputs[0], inputs[1][None], torch.float32) == 1 + SIZES[size]
    used = peak_bytes(
        lambda: fastkl.kl_gmm(*(inputs[0].detach(),) * 2, *(t.detach() for t in inputs[1:]), num_samples=3)
    )
    assert used < 32 * MIB + 64 * n


@pytest.mark.parametrize("limit", ["COMPONENTS_BYTES", "KEPT_BYTES"])
def test_slices_and_blocks_change_nothing(monkeypatch, limit):
    inputs = [tensor.float() for tensor in EXTREMES["ordinary"]()]
    monkeypatch.setattr(_gmm, "SMALL", 0)
    expected = gradients(fastkl.gmm_log_prob, *inputs)
    monkeypatch.setattr(_mixture, limit, 4000)
    monkeypatch.setattr("fastkl.ops._components.PRODUCT_BYTES", 8000)
    monkeypatch.setattr("fastkl.ops._components.DIFFERENCES_BYTES", 8000)
    torch.testing.assert_close(gradients(fastkl.gmm_log_prob, *inputs), expected, rtol=1e-5, atol=1e-5)
