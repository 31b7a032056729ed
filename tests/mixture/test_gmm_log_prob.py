"""gmm_log_prob and gmm_responsibilities against other libraries' mixtures, and properties of a mixture."""

import math

import numpy as np
import pytest
import torch
from torch import distributions

import fastkl
from fastkl import reference
from fastkl.ops.mixture import _at_once
from fastkl.ops.mixture.gmm_log_prob import gmm_log_prob_bwd, gmm_log_prob_fwd

from gmm_helpers import BACKENDS, draw, gradients, ordinary, outputs, triangles
from helpers import DEVICE, Package, implementation, leaf, poisoned_memory

special = Package("scipy.special")
stats = Package("scipy.stats")
mixture = Package("sklearn.mixture")

N, K, D = 11, 5, 3
COVARIANCES = {"diagonal": (K, D), "spherical": (K, 1), "tied": (1, D), "one for each dimension": (D,), "unit": None}


def same_family(z, logits, means, logvars):
    components = distributions.Independent(distributions.Normal(means, torch.exp(0.5 * logvars)), 1)
    weights = distributions.Categorical(logits=logits)
    return distributions.MixtureSameFamily(weights, components).log_prob(z)


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
    z, logits, means, tril = draw(N, D), draw(K, seed=1), draw(K, D, seed=2), triangles(K, size=D)
    with implementation(backend):
        actual = fastkl.gmm_log_prob(z, logits, means, scale_tril=tril)
        noise = 7 * torch.ones_like(tril).triu(1)  # above the diagonal, which is not read
        torch.testing.assert_close(fastkl.gmm_log_prob(z, logits, means, scale_tril=tril + noise), actual)
    weights = special.log_softmax(logits.cpu().numpy())
    covariances = (tril @ tril.mT).cpu().numpy()
    parts = [
        stats.multivariate_normal.logpdf(z.cpu(), mean, covariance)
        for mean, covariance in zip(means.cpu().numpy(), covariances)
    ]
    expected = special.logsumexp(np.stack(parts, 1) + weights, axis=1)
    np.testing.assert_allclose(actual.cpu(), expected, rtol=1e-10)


@pytest.mark.parametrize("covariance", ["diag", "spherical", "tied", "full"])
def test_scikit_learn_scores(covariance):
    z = draw(200, D).cpu().numpy()
    model = mixture.GaussianMixture(4, covariance_type=covariance, random_state=0, max_iter=5, tol=0).fit(z)
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


@pytest.mark.parametrize("backend", [*BACKENDS, "torch, in blocks"])
def test_a_component_of_weight_zero_is_not_there(monkeypatch, backend):
    if "blocks" in backend:
        monkeypatch.setattr(_at_once, "SMALL", 0)
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
    z, logits, means, logvars = ordinary()
    value = fastkl.gmm_log_prob(z, logits, means, logvars)
    order = torch.randperm(20)
    torch.testing.assert_close(fastkl.gmm_log_prob(z, logits[order], means[order], logvars[order]), value)
    torch.testing.assert_close(fastkl.gmm_log_prob(z + 3, logits, means + 3, logvars), value)
    torch.testing.assert_close(fastkl.gmm_log_prob(z, logits + 100, means, logvars), value)
    one = fastkl.gmm_log_prob(z, logits[:1], means[:1], logvars[:1])
    torch.testing.assert_close(one, fastkl.normal_log_prob(z, means[:1], logvars[:1]))
    responsibilities = fastkl.gmm_responsibilities(z, logits, means, logvars)
    torch.testing.assert_close(responsibilities.exp().sum(-1), torch.ones_like(value))


def test_gradients_of_weights_within_the_softmax():
    """Two large sums that cancel: in float16 each of them alone would be infinite."""
    z, means = torch.zeros(70_000, 1, device=DEVICE).half(), torch.zeros(2, 1, device=DEVICE).half()
    logits = leaf(torch.tensor([4.0, 0.0]).half())
    for again in (False, True):
        value = fastkl.gmm_log_prob(z, logits, means).sum()
        (gradient,) = torch.autograd.grad(value, logits, create_graph=again)
        assert gradient.abs().max() < 0.1


@pytest.mark.skipif(DEVICE != "cpu", reason="the closed form's expansion")
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("components", [1, K])
def test_a_point_infinitely_far_away(monkeypatch, small, components):
    """ln p = -inf, by expansion and by differences; NaN stays NaN, and other rows are unaffected."""
    monkeypatch.setattr(_at_once, "SMALL", _at_once.SMALL if small else 0)
    z, logits, means = draw(N, D), draw(components, seed=1), draw(components, D, seed=2)
    expected = fastkl.gmm_log_prob(z, logits, means)
    infinity = float("inf")
    z[0, 1], z[2, 0], z[4], z[6, 2], z[8, 0] = infinity, -infinity, infinity, math.nan, math.nan
    z[8, 1] = infinity
    expected[[0, 2, 4]], expected[[6, 8]] = -infinity, math.nan
    for precision in ("exact", "tf32x3"):
        actual = fastkl.gmm_log_prob(z, logits, means, precision=precision)
        torch.testing.assert_close(actual, expected, equal_nan=True)
    bound = fastkl.kl_gmm(z, torch.zeros_like(z), logits, means, method="upper")
    assert (bound[[0, 2, 4]] == infinity).all()


@pytest.mark.parametrize("components", [1, K])
@pytest.mark.parametrize("form", ["point", "expected", "convolved"])
def test_a_point_infinitely_far_away_in_the_kernels(form, components):
    z, logits, means = draw(N, D), draw(1, components, seed=1), draw(1, components, D, seed=2)
    z[0, 1], z[2], z[4, 0] = float("inf"), -float("inf"), math.nan
    logvar = None if form == "point" else draw(N, D, seed=3)
    with implementation("triton"):
        (actual,) = gmm_log_prob_fwd(z, logvar, logits, means, None, None, form, "exact", 0)
    assert (actual[[0, 2]] == -float("inf")).all()
    assert actual[4].isnan()
    assert actual[[1, 3, *range(5, N)]].isfinite().all()


@pytest.mark.parametrize("small", [True, False])
def test_a_gradient_asked_for_alone_is_the_one_among_all(monkeypatch, small):
    monkeypatch.setattr(_at_once, "SMALL", _at_once.SMALL if small else 0)
    inputs, settings = (draw(N, D), None, draw(1, K), draw(1, K, D), draw(1, K, D), None), ("point", "exact")
    dlp, lp = gmm_log_prob_fwd(*inputs, *settings, 1)
    with poisoned_memory():
        everything = outputs(inputs)
        gmm_log_prob_bwd(dlp, lp, None, *inputs, *everything, *settings)
        for place in (0, 2, 3, 4):
            alone = outputs(inputs, {place})
            gmm_log_prob_bwd(dlp, lp, None, *inputs, *alone, *settings)
            assert torch.equal(alone[place], everything[place])
