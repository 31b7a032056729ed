"""Shapes, batches and dtypes that Pythae takes, with fastkl inside and without."""

import pytest
import torch

models = pytest.importorskip("pythae.models")

from fastkl.integrations import pythae  # noqa: E402

LATENT, BATCH = 5, 7
SAMPLES = {"IWAE": ("number_samples",), "CIWAE": ("number_samples",)}
SAMPLES |= {name: ("number_gradient_estimates", "number_samples") for name in ("MIWAE", "PIWAE")}
OTHERS = ["VAE", "BetaVAE", "VAMP", "WAE_MMD", "INFOVAE_MMD", "BetaTCVAE"]


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(name: str, size: tuple[int, ...], **settings):
    torch.manual_seed(0)
    config = getattr(models, name + ("_Config" if "MMD" in name else "Config"))
    return getattr(models, name)(config(input_dim=size, latent_dim=LATENT, **settings))


def step(trained, x: torch.Tensor, **inputs) -> list[torch.Tensor]:
    trained.zero_grad()
    torch.manual_seed(1)
    out = trained({"data": x}, **inputs)
    out.loss.backward()
    values = [out[key].detach() for key in ("loss", "recon_loss", "reg_loss", "mmd_loss") if key in out]
    return values + [parameter.grad.clone() for parameter in trained.parameters() if parameter.grad is not None]


def compare(trained, x: torch.Tensor, **inputs) -> None:
    expected = step(trained, x, **inputs)
    with pythae.enable():
        actual = step(trained, x, **inputs)
    for found, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("size", [(12,), (1, 12), (1, 1, 12), (3, 4)])
def test_one_sample_is_no_dimension_of_the_data(name, size):
    """A loss of one sample is that of Pythae, whose weights are 1. Data of size (1, 12) look like it."""
    compare(model(name, size, **dict.fromkeys(SAMPLES[name], 1)), torch.rand(BATCH, *size))


@pytest.mark.parametrize("name", [*OTHERS, *SAMPLES])
@pytest.mark.parametrize("size", [(12,), (4, 3), (1, 12)])
def test_data_may_be_flat_where_the_decoder_makes_images(name, size):
    trained = model(name, (1, 4, 3), **dict.fromkeys(SAMPLES.get(name, ()), 1))
    compare(trained, torch.rand(BATCH, *size))


@pytest.mark.parametrize("settings", [{"dataset_size": 100}, {"dataset_size": 1}, {}])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_last_batch_of_an_epoch_may_be_one_datum(settings, batch):
    """And a data set smaller than a batch, with minibatch weights, which divide by its size alone."""
    compare(model("BetaTCVAE", (12,), use_mss=False, beta=3.0), torch.rand(batch, 12), **settings)


@pytest.mark.parametrize("name", ["VAE", "BetaVAE", "VAMP", *SAMPLES])
def test_a_batch_of_one(name):
    compare(model(name, (12,), **dict.fromkeys(SAMPLES.get(name, ()), 1)), torch.rand(1, 12))


@pytest.mark.parametrize("name", ["VAE", "WAE_MMD", *SAMPLES])
def test_losses_of_16_bits_are_not_rounded_to_whole_nats(name):
    """The reconstruction loss of these data is about 300: a number of bfloat16 is even there."""
    trained = model(name, (4096,), **dict.fromkeys(SAMPLES.get(name, ()), 3)).bfloat16()
    recon = torch.rand(BATCH, *[3] * len(SAMPLES.get(name, ())), 4096).bfloat16()
    x = torch.rand(BATCH, 4096).bfloat16()
    mu, log_var, z = (torch.randn(BATCH, *recon.shape[1:-1], LATENT).bfloat16() for _ in range(3))
    given = (z, mu) if name == "WAE_MMD" else (mu, 0.1 * log_var, z)
    with pythae.enable():
        exact = trained.loss_function(recon.double(), x.double(), *(t.double() for t in given))
        found = trained.loss_function(recon, x, *given)
    for actual, true in zip(found, exact, strict=True):
        torch.testing.assert_close(actual.double(), true, rtol=2e-4, atol=1e-4)
