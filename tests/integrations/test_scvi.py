"""scvi-tools with fastkl inside, against itself."""

import warnings

import numpy as np
import pytest
import torch

scvi = pytest.importorskip("scvi")

from scvi.module.base import MogPrior  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from fastkl.integrations import distributions  # noqa: E402
from fastkl.integrations import scvi as integration  # noqa: E402
from fastkl.integrations._switch import UnsupportedVersion  # noqa: E402


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(distributions, "SMALL_MIXTURE", 0)
    scvi.settings.seed = 0


def gradients(function, tensors) -> list[torch.Tensor]:
    torch.manual_seed(1)
    value = function()
    return [value.detach(), *torch.autograd.grad(value.sum(), tensors)]


@pytest.mark.parametrize("labels", [False, True])
def test_kl_to_a_mixture_is_what_it_was(labels):
    prior = MogPrior(5, 3, celltype_bias=labels).double()
    loc, scale = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64) + 0.5
    loc.requires_grad_(), scale.requires_grad_()
    y = torch.arange(7)[:, None] % 5 if labels else None
    tensors = [loc, scale, *prior.parameters()]
    expected = gradients(lambda: prior.kl(Normal(loc, scale), labels=y), tensors)
    with integration.enable():
        actual = gradients(lambda: prior.kl(Normal(loc, scale), labels=y), tensors)
    for found, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-10)


MODELS = {  # a Normal prior, a VampPrior and a mixture
    "SCVI": (scvi.model.SCVI, {}),
    "CondSCVI": (scvi.model.CondSCVI, {"prior": "mog", "num_classes_mog": 3}),
    "SysVI": (scvi.external.SysVI, {"n_prior_components": 4}),
    "CytoVI": (scvi.external.CYTOVI, {"prior_mixture_k": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_before(name):
    anndata = pytest.importorskip("anndata")
    counts = np.random.default_rng(0).poisson(2.0, (60, 20)).astype(np.float32)

    def train() -> list[float]:
        scvi.settings.seed = 0
        cells = anndata.AnnData(counts.copy() if name in ("SCVI", "CondSCVI") else counts / counts.max())
        cells.obs["batch"] = ["a", "b"] * 30
        kind, settings = MODELS[name]
        kind.setup_anndata(cells, batch_key="batch")
        model = kind(cells, n_hidden=8, n_latent=3, **settings)
        model.train(max_epochs=2, batch_size=30, accelerator="cpu", enable_progress_bar=False, logger=None)
        return [parameter.abs().sum().item() for parameter in model.module.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = train()
        with integration.enable():
            actual = train()
    assert actual == pytest.approx(expected, rel=1e-4)


def test_another_prior_is_refused():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MogPrior, "kl", lambda self, qz: None)
        with pytest.raises(UnsupportedVersion, match="scvi-tools"):
            integration.enable()
