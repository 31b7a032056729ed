"""GaussianMixture.fit: scikit-learn's iterations from the same start, k-means++, and what goes wrong with data."""

import math

import pytest
import torch

import fastkl
from fastkl.priors import GaussianMixture, _fit

from helpers import DEVICE
from prior_helpers import COVARIANCES

mixture = pytest.importorskip("sklearn.mixture")

REGULARISATION = 1e-6
ITERATIONS = 15
K, D, N = 5, 3, 400


def data(dtype=torch.float64) -> torch.Tensor:
    """Overlapping, elongated clusters, far from 0: EM goes on for many iterations."""
    generator = torch.Generator().manual_seed(3)
    centres = 2.0 * torch.randn(K, D, generator=generator, dtype=torch.float64) + 10
    shapes = torch.randn(K, D, D, generator=generator, dtype=torch.float64)
    chosen = torch.randint(K, (N,), generator=generator)
    noise = torch.randn(N, 1, D, generator=generator, dtype=torch.float64)
    return (centres[chosen] + (noise @ shapes[chosen]).squeeze(1)).to(DEVICE, dtype)


def start(covariance: str, z: torch.Tensor) -> GaussianMixture:
    """Means near some data, unequal weights, covariances of different size and, where there is room, orientation."""
    torch.manual_seed(1)
    prior = GaussianMixture(K, D, covariance).to(z)
    with torch.no_grad():
        prior.logits.copy_(torch.linspace(0, 1, K))
        prior.means.copy_(z[:K])
        for parameter in (prior.log_diagonal, prior.lower) if covariance == "full" else (prior.logvars,):
            parameter.copy_(0.5 * torch.randn(parameter.shape) + 0.5)
    return prior


def scikit(prior: GaussianMixture, **settings) -> mixture.GaussianMixture:
    """scikit-learn's estimator at the prior's parameters. Its "tied" is one full covariance: see `pooled`."""
    kind = "diag" if prior.covariance == "tied" else prior.covariance
    precisions = (prior.scale_tril @ prior.scale_tril.mT).inverse()
    if kind != "full":
        precisions = precisions.diagonal(dim1=-2, dim2=-1)
    if kind == "spherical":
        precisions = precisions[:, 0]
    weights = torch.softmax(prior.logits, -1)
    given = {"weights_init": weights, "means_init": prior.means, "precisions_init": precisions}
    return mixture.GaussianMixture(
        K, covariance_type=kind, reg_covar=REGULARISATION, tol=0.0, init_params="random",
        **{name: tensor.detach().cpu().numpy() for name, tensor in given.items()}, **settings,
    )  # fmt: skip


def pooled(prior: GaussianMixture, z) -> tuple[list[float], mixture.GaussianMixture]:
    """EM with one diagonal shared by all: scikit-learn's diagonal step, whose variances are then averaged by weight."""
    model, bounds = scikit(prior, max_iter=1, warm_start=True), []
    for _ in range(ITERATIONS):
        model.fit(z)
        # The bound that fit leaves is that of the parameters before its step.
        bounds.append(model.lower_bound_)
        model.covariances_[:] = model.weights_ @ model.covariances_
        model.precisions_cholesky_ = model.covariances_**-0.5
    return bounds, model


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_every_iteration_is_that_of_scikit_learn(covariance, dtype):
    z = data()
    prior = start(covariance, z)
    if covariance == "tied":
        bounds, model = pooled(prior, z.cpu().numpy())
    else:
        model = scikit(prior, max_iter=ITERATIONS).fit(z.cpu().numpy())
        bounds = model.lower_bounds_
    prior = prior.to(dtype)
    settings = {"iterations": ITERATIONS, "tolerance": 0.0, "init": "current", "regularisation": REGULARISATION}
    record = prior.fit(z.to(dtype), **settings)
    assert len(bounds) == len(record.log_likelihood) == ITERATIONS
    assert not record.converged
    budget = 1e-10 if dtype == torch.float64 else 1e-5
    assert max(abs(a - b) for a, b in zip(bounds, record.log_likelihood)) < budget
    assert bounds[-1] - bounds[0] > 0.1, "a start that is not the end"
    if dtype == torch.float64:
        scores = torch.from_numpy(model.score_samples(z.cpu().numpy())).to(DEVICE)
        torch.testing.assert_close(prior.log_prob(z), scores, rtol=1e-9, atol=1e-9)
        shares = torch.from_numpy(model.predict_proba(z.cpu().numpy())).to(DEVICE)
        torch.testing.assert_close(prior.responsibilities(z).exp(), shares, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(prior.usage(z).shares, shares.mean(0), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_finds_as_good_a_mixture_as_scikit_learn(covariance):
    """k-means++ and EM to the end, against the best of scikit-learn's own starts."""
    z = data()
    prior = GaussianMixture(K, D, covariance).to(z)
    found = max(prior.fit(z, seed=seed, tolerance=1e-6, iterations=300).log_likelihood[-1] for seed in range(5))
    if covariance == "tied":  # scikit-learn has none, but the truth lies between one of its kinds and a single Gaussian
        least = mixture.GaussianMixture(1, covariance_type="diag").fit(z.cpu().numpy())
    else:
        least = mixture.GaussianMixture(K, covariance_type=covariance, tol=1e-6, max_iter=300, n_init=5, random_state=0)
        least.fit(z.cpu().numpy())
    assert found > least.score(z.cpu().numpy()) - 0.01


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_likelihood_never_falls(covariance):
    record = GaussianMixture(K, D, covariance).to(data()).fit(data(), seed=0, regularisation=0.0, tolerance=1e-5)
    assert all(later > earlier - 1e-12 for earlier, later in zip(record.log_likelihood, record.log_likelihood[1:]))
    assert record.converged
    assert abs(record.log_likelihood[-1] - record.log_likelihood[-2]) < 1e-5


def test_a_start_from_means_takes_the_rest_from_the_nearest_data():
    z = torch.tensor([[0.0], [2.0], [10.0], [14.0], [15.0]], device=DEVICE)
    mixture = _fit.hard_start(z, torch.tensor([[1.5], [12.0]], device=DEVICE), "diag", 0.0)
    torch.testing.assert_close(mixture[0].exp(), z.new_tensor([0.4, 0.6]), rtol=1e-5, atol=0)
    torch.testing.assert_close(mixture[1], z.new_tensor([[1.0], [13.0]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(mixture[2].exp(), z.new_tensor([[1.0], [14 / 3]]), rtol=1e-4, atol=0)
    full = _fit.hard_start(z, torch.tensor([[1.5], [12.0]], device=DEVICE), "full", 0.0)
    torch.testing.assert_close(full[3].flatten().square(), mixture[2].exp().flatten())
    prior = GaussianMixture(2, 1).to(DEVICE)
    prior.fit(z, init=torch.tensor([[1.5], [12.0]], device=DEVICE), iterations=1)
    assert prior.means.detach().flatten().sort().values.sub(z.new_tensor([1.0, 13.0])).abs().max() < 0.1


def test_k_means_plus_plus_finds_distinct_clusters():
    """Each of 20 narrow clusters gets a centre, which uniform seeding does once in a hundred million."""
    centres = 100 * torch.arange(20.0, device=DEVICE).unsqueeze(1)
    z = (centres + 0.1 * torch.randn(50, 20, 1, device=DEVICE)).reshape(-1, 1)
    generator = torch.Generator(DEVICE).manual_seed(0)
    found = _fit.kmeans(z, 20, generator).sort(0).values
    torch.testing.assert_close(found, centres, rtol=0, atol=0.1)
    assert torch.equal(found, _fit.kmeans(z, 20, torch.Generator(DEVICE).manual_seed(0)).sort(0).values)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_components_without_data_stay_finite(covariance):
    """Three distinct data for five components; and a component far from all data keeps its place."""
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]], device=DEVICE).repeat(10, 1)
    prior = GaussianMixture(5, 2, covariance).to(DEVICE)
    record = prior.fit(z, seed=0, iterations=20)
    assert all(map(math.isfinite, record.log_likelihood))
    assert all(parameter.isfinite().all() for parameter in prior.parameters())
    assert prior.usage(z).used == 3
    with torch.no_grad():
        prior.reset_parameters()
        prior.means[0] = 1e4
    before = prior.mixture()
    kept = [None if t is None else t.detach()[0].clone() for t in before[1:]]
    prior.fit(torch.randn(200, 2, device=DEVICE), init="current", iterations=20)
    assert prior.means[0].tolist() == kept[0].tolist()
    if covariance in ("diag", "spherical"):
        torch.testing.assert_close(prior.logvars[0].detach(), kept[1], rtol=1e-3, atol=0)  # 20 regularisations
    elif covariance == "full":
        torch.testing.assert_close(prior.scale_tril[0].detach(), kept[2], rtol=1e-3, atol=0)
    if covariance != "tied":  # as the docstring says: once in every iteration
        with torch.no_grad():
            prior.means[0], before = 1e4, prior.scale_tril[0].square().sum(-1)
        count = len(prior.fit(torch.randn(200, 2, device=DEVICE), init="current", tolerance=0.0, iterations=8,
                              regularisation=0.25).log_likelihood)  # fmt: skip
        torch.testing.assert_close(prior.scale_tril[0].detach().square().sum(-1), before + 0.25 * count)
    assert prior.logits[0].isfinite()
    assert torch.softmax(prior.logits, -1)[0] < 1e-6


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupted_fit_keeps_the_last_complete_iteration(stop):
    z, seen = data(), []

    def progress(iteration, log_likelihood):
        seen.append((iteration, log_likelihood))
        if iteration == 3:
            raise stop

    interrupted, whole = (start("diag", z) for _ in range(2))
    with pytest.raises(stop):
        interrupted.fit(z, init="current", progress=progress)
    record = whole.fit(z, init="current", iterations=3, tolerance=0.0)
    assert seen == list(enumerate(record.log_likelihood, 1))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, interrupted.get_parameter(name)), name


BAD = {
    "few": (lambda p, z: p.fit(z[: K - 1]), ValueError, "z must hold at least 5 data.*got 4"),
    "nan": (lambda p, z: p.fit(z.index_fill(0, z.new_tensor([2]).long(), math.nan)), ValueError, "z must be finite"),
    "inf": (lambda p, z: p.fit(z.index_fill(0, z.new_tensor([2]).long(), math.inf)), ValueError, "z must be finite"),
    "shape": (lambda p, z: p.fit(z[:, :2]), ValueError, r"z must be \(\*batch, 3\), got \(400, 2\)"),
    "ints": (lambda p, z: p.fit(z.long()), TypeError, "z must be a floating-point tensor"),
    "array": (lambda p, z: p.fit(z.tolist()), TypeError, "z must be a torch.Tensor"),
    "init": (lambda p, z: p.fit(z, init="kmeans"), ValueError, "init must be 'k-means\\+\\+'"),
    "init shape": (lambda p, z: p.fit(z, init=z[:2]), ValueError, r"init must be \(5, 3\), got \(2, 3\)"),
    "init nan": (lambda p, z: p.fit(z, init=z[:5] * math.nan), ValueError, "init must be finite"),
    "iterations": (lambda p, z: p.fit(z, iterations=0), ValueError, "iterations must be at least 1"),
    "tolerance": (lambda p, z: p.fit(z, tolerance=-1.0), ValueError, "tolerance must be"),
    "regularisation": (lambda p, z: p.fit(z, regularisation=-1.0), ValueError, "regularisation must be"),
    "singular": (lambda p, z: p.fit(z * 0, regularisation=0.0), ValueError, "component 0 is singular"),
    "device": (lambda p, z: p.fit(z.to("meta")), ValueError, "meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_nothing_changes(name):
    call, error, message = BAD[name]
    prior = start("diag", data())
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    with pytest.raises(error, match=message):
        call(prior, data())
    assert all(torch.equal(before[name], tensor) for name, tensor in prior.state_dict().items())
    if name == "singular":
        full = GaussianMixture(K, D, "full").double().to(DEVICE)
        with pytest.raises(error, match=message):
            call(full, data())


def test_fitted_to_posteriors_it_is_their_average():
    """A mixture of the means alone is far too narrow; one component is the average's moments."""
    generator = torch.Generator().manual_seed(2)
    mu = (0.3 * torch.randn(500, 8, generator=generator)).to(DEVICE)
    q = fastkl.DiagonalNormal(mu, torch.full_like(mu, -0.1).requires_grad_())
    standard, prior = q.kl().mean(), GaussianMixture(K, 8).to(DEVICE)
    prior.fit(mu, seed=0)
    assert prior.kl(q, num_samples=50, seed=1).mean() > 2 * standard
    prior.fit(q, seed=0)
    assert prior.kl(q, num_samples=50, seed=1).mean() < 1.2 * standard
    again = GaussianMixture(K, 8).to(DEVICE)
    again.fit(fastkl.DiagonalNormal(mu.view(500, 2, 4), q.logvar.view(500, 2, 4)), seed=0)
    assert all(map(torch.equal, prior.parameters(), again.parameters()))
    one = GaussianMixture(1, 8).to(DEVICE)
    one.fit(q, seed=0, num_samples=100)
    torch.testing.assert_close(one.means[0], mu.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(one.logvars[0].exp(), mu.var(0) + math.exp(-0.1), rtol=0.03, atol=0)


def _posterior(**changes):
    given = {"mu": torch.zeros(20, 3, device=DEVICE), "logvar": torch.zeros(20, 3, device=DEVICE)} | changes
    return fastkl.DiagonalNormal(**given)


BAD_POSTERIORS = {
    "few": (lambda p: p.fit(_posterior(mu=torch.zeros(3, 3, device=DEVICE), logvar=torch.zeros(3, 3, device=DEVICE))),
            "z must hold at least 5 data.*got 3"),
    "dim": (lambda p: p.fit(fastkl.DiagonalNormal(*torch.zeros(2, 20, 2, device=DEVICE))), r"events of shape \(2,\)"),
    "nan": (lambda p: p.fit(_posterior(logvar=torch.full((20, 3), math.nan, device=DEVICE))), "z must be finite"),
    "draws": (lambda p: p.fit(_posterior(), num_samples=0), "num_samples must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_POSTERIORS)
def test_bad_posteriors_are_refused(name):
    call, message = BAD_POSTERIORS[name]
    with pytest.raises(ValueError, match=message):
        call(GaussianMixture(5, 3).to(DEVICE))
