"""Pythae with fastkl inside, against itself in float64."""

import inspect
import zlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

models = pytest.importorskip("pythae.models")

from fastkl.integrations import distributions, pythae  # noqa: E402
from fastkl.integrations._switch import UnsupportedVersion  # noqa: E402

SIZE, LATENT, BATCH = (1, 4, 3), 5, 7


@pytest.fixture(autouse=True, params=["by ops", "small"])
def size(request, monkeypatch):
    monkeypatch.setattr(distributions, "SMALL_MIXTURE", 0 if request.param == "by ops" else 10**9)


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def model(name: str, **settings):
    config = getattr(models, f"{name}_Config" if name.endswith("MMD") else f"{name}Config")(
        input_dim=SIZE, latent_dim=LATENT, **settings
    )
    return getattr(models, name)(config)


def step(trained, x: torch.Tensor, **inputs) -> list[torch.Tensor]:
    """Outputs and gradients, of the same noise each time."""
    trained.zero_grad()
    torch.manual_seed(1)
    out = trained({"data": x}, **inputs)
    out.loss.backward()
    values = [out[key].detach() for key in ("loss", "recon_loss", "reg_loss", "mmd_loss") if key in out]
    return values + [parameter.grad.clone() for parameter in trained.parameters() if parameter.grad is not None]


CASES = {
    "VAE": {},
    "VAE, bce": {"reconstruction_loss": "bce"},
    "BetaVAE": {"beta": 3.0},
    "VAMP": {"number_components": 6},
    "VAMP, linear": {"number_components": 6, "linear_scheduling_steps": 10},
    "CIWAE": {"number_samples": 4, "beta": 1.0},
    "WAE_MMD": {"kernel_choice": "imq", "kernel_bandwidth": 1.3, "scales": [0.5, 2.0]},
    "WAE_MMD, rbf": {"kernel_choice": "rbf", "kernel_bandwidth": 0.7},
    "INFOVAE_MMD": {"kernel_choice": "imq", "alpha": 0.2, "lbd": 2.0},
    "INFOVAE_MMD, rbf": {"kernel_choice": "rbf", "reconstruction_loss": "bce"},
    "BetaTCVAE": {"alpha": 2.0, "beta": 5.0, "gamma": 0.5, "use_mss": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_what_it_was(case):
    trained, x = model(case.partition(",")[0], **CASES[case]), torch.rand(BATCH, *SIZE)
    expected = step(trained, x)
    with pythae.enable():
        actual = step(trained, x)
    assert len(actual) == len(expected) > 3
    for found, true in zip(actual, expected):
        # Pythae takes the logarithm of the number of components, and of posteriors, in float32.
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-7)


class Work(TorchDispatchMode):
    """Counts the elements that operations write: a step's cost where the networks are the same."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.elements += out.numel()
        return out


def test_a_small_mixture_is_less_work_than_pythaes_own(monkeypatch):
    monkeypatch.setattr(distributions, "SMALL_MIXTURE", 10**9)
    trained, x = model("VAMP", number_components=50), torch.rand(BATCH, *SIZE)

    def work() -> int:
        with Work() as counted:
            step(trained, x)
        return counted.elements

    stock = work()
    with pythae.enable():
        assert work() < stock


@pytest.mark.parametrize("case", ["IWAE", "CIWAE"])
def test_importance_weighted_losses_are_the_bound(case):
    """The gradient is what it was; the loss was the weighted average of ln w."""
    trained, x = model(case, number_samples=4, **({"beta": 0.3} if case == "CIWAE" else {})), torch.rand(BATCH, *SIZE)
    expected = step(trained, x)
    with pythae.enable():
        actual = step(trained, x)
    assert actual[0] > expected[0]
    for found, true in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-10)


def log_weights(trained, x: torch.Tensor, repetitions: int, samples: int) -> torch.Tensor:
    """[N, repetitions, samples] of the noise of `step`, by torch.distributions."""
    encoded = trained.encoder(x)
    shape = (len(x), repetitions, samples, LATENT)
    mu, std = (t[:, None, None].expand(shape) for t in (encoded.embedding, torch.exp(0.5 * encoded.log_covariance)))
    torch.manual_seed(1)
    q, p = torch.distributions.Normal(mu, std), torch.distributions.Normal(torch.zeros(()), 1.0)
    z = mu + std * torch.randn(shape)
    recon = trained.decoder(z.reshape(-1, LATENT)).reconstruction.reshape(*shape[:3], -1)
    loss = 0.5 * (recon - x.flatten(1)[:, None, None]).square().sum(-1)
    return p.log_prob(z).sum(-1) - q.log_prob(z).sum(-1) - loss


@pytest.mark.parametrize("case", ["MIWAE", "PIWAE"])
def test_weights_are_normalised_over_the_samples(case):
    """Pythae does so over the repetitions: with one of them it has the ELBO."""
    trained = model(case, number_gradient_estimates=3, number_samples=4)
    x = torch.rand(BATCH, *SIZE)
    log_w = log_weights(trained, x, 3, 4)
    exact = -(log_w.logsumexp(2) - torch.tensor(4.0).log()).mean()
    if case == "PIWAE":
        exact = exact - (log_w.flatten(1).logsumexp(1) - torch.tensor(12.0).log()).mean()
    stock = step(trained, x)[0]
    with pythae.enable():
        torch.testing.assert_close(step(trained, x)[0], exact.detach())
    assert (stock - exact).abs() > 1e-3


def test_each_datum_weighs_its_own_posterior():
    """Pythae's stratified weights have 1 / dataset_size in the first column, in place of the diagonal."""
    trained, x, dataset_size = model("BetaTCVAE", alpha=2.0, beta=5.0, use_mss=True), torch.rand(BATCH, *SIZE), 100
    with torch.no_grad():
        for parameter in trained.encoder.log_var.parameters():
            parameter.fill_(-1.0)
        for parameter in trained.encoder.embedding.parameters():
            parameter.mul_(30.0)
    stock = step(trained, x, dataset_size=dataset_size)[2]
    with pythae.enable():
        actual = step(trained, x, dataset_size=dataset_size)[2]
    encoded = trained.encoder(x)
    torch.manual_seed(1)
    mu, std = encoded.embedding, torch.exp(0.5 * encoded.log_covariance)
    z = mu + torch.randn_like(std) * std
    m = BATCH - 1
    weights = torch.full((BATCH, BATCH), 1 / m)
    for row in range(BATCH):
        weights[row, row] = 1 / dataset_size
        weights[row, (row + 1) % BATCH] = (dataset_size - m) / (dataset_size * m)
    density = torch.distributions.Normal(mu, std).log_prob(z[:, None])
    own = density.diagonal(dim1=0, dim2=1).sum(0)
    q = (weights.log() + density.sum(-1)).logsumexp(1)
    product = (weights.log()[..., None] + density).logsumexp(1).sum(-1)
    prior = torch.distributions.Normal(torch.zeros(()), 1.0).log_prob(z).sum(-1)
    a, b, c = trained.alpha, trained.beta, trained.gamma
    exact = (a * (own - q) + b * (q - product) + c * (product - prior)).mean()
    torch.testing.assert_close(actual, exact.detach())
    assert (stock - exact).abs() > 1e-3


def test_disabled_it_leaves_every_class_as_it_was():
    before = {name: dict(vars(getattr(models, name))) for name in pythae.METHODS}
    with pythae.enable():
        assert vars(models.VAE)["loss_function"] is pythae.vae
    assert {name: dict(vars(getattr(models, name))) for name in pythae.METHODS} == before


def test_other_methods_are_refused_and_nothing_is_replaced():
    stock = models.VAE.loss_function
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.BetaTCVAE, "loss_function", lambda self, recon_x: None)
        with pytest.raises(UnsupportedVersion, match="BetaTCVAE"):
            pythae.enable()
        assert models.VAE.loss_function is stock


def test_the_methods_are_those_that_were_read():
    """In Pythae 0.1.2. If their source changes, read it, run the tests above, and update the checksum here."""
    texts = [inspect.getsource(getattr(getattr(models, name), method)) for name, (method, *_) in pythae.METHODS.items()]
    assert zlib.crc32("".join(texts).encode()) == 530976599
