"""Lightning: the module that trains a VAE, and the callback that watches for collapse."""

import warnings

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch")

import fastkl  # noqa: E402
from fastkl.integrations.lightning import CollapseMonitor, VAEModule  # noqa: E402
from fastkl.vae.model import VAE, mlp  # noqa: E402

N, SHAPE, LATENT = 64, (12,), 3


def vae() -> VAE:
    torch.manual_seed(0)
    encoder, decoder, latent = mlp(SHAPE, LATENT, 16, 1)
    return VAE(encoder, decoder, SHAPE, latent, "normal")


def loader() -> torch.utils.data.DataLoader:
    torch.manual_seed(1)
    x = torch.randn(N, 2) @ torch.randn(2, *SHAPE) + 0.1 * torch.randn(N, *SHAPE)
    return torch.utils.data.DataLoader(x, batch_size=16)


def fit(module, epochs: int, folder, *callbacks, **settings):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks), log_every_n_steps=2, **settings,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(module, loader(), loader())
    return trainer, [str(warning.message) for warning in told if "collapse" in str(warning.message)]


@pytest.mark.parametrize("prior", [None, "mixture"])
def test_a_step_is_that_of_the_objective(prior, tmp_path):
    module = VAEModule(vae(), None if prior is None else fastkl.priors.GaussianMixture(4, LATENT), learning_rate=0.01)
    x = next(iter(loader()))
    torch.manual_seed(2)
    loss = module.loss(x)[0]
    torch.manual_seed(2)
    by_hand = fastkl.objectives.elbo(module.vae.posterior(x), module.prior, lambda z: module.vae.log_likelihood(z, x))
    assert torch.equal(loss, by_hand.loss)
    trainer, _ = fit(module, 15, tmp_path)
    assert trainer.callback_metrics["val_loss"] < loss - 1
    assert {"loss", "elbo", "kl", "reconstruction"} <= trainer.callback_metrics.keys()


def test_weight_and_remedy_reach_the_objective():
    def remedy(q, kl):
        return 0 * kl + 7.0

    module, seen = VAEModule(vae(), beta=lambda step: 0.5 + step, remedy=remedy), next(iter(loader()))
    loss, terms, _ = module.loss((seen, "labels"))
    torch.testing.assert_close(loss, 0.5 * 7.0 - terms["reconstruction"])


def test_figures_are_logged_and_a_healthy_run_is_not_warned_of(tmp_path):
    trainer, told = fit(VAEModule(vae(), learning_rate=0.01), 20, tmp_path, CollapseMonitor(grace=15))
    assert told == []
    figures = trainer.callback_metrics
    assert figures["active_units"] >= 2
    assert figures["kl"] > 1
    assert 0 < figures["mutual_information"] <= figures["kl"]


def test_a_collapse_is_said_once_with_its_remedies(tmp_path):
    _, told = fit(VAEModule(vae(), beta=1e4, learning_rate=0.01), 12, tmp_path, CollapseMonitor(grace=4))
    assert len(told) == 1
    assert "free bits" in told[0]


def test_a_module_without_posteriors_is_told_so(tmp_path):
    class Other(VAEModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    with pytest.raises(TypeError, match="posterior"):
        fit(Other(vae()), 1, tmp_path, CollapseMonitor())


def test_without_logging_the_figures_are_there(tmp_path):
    module, monitor = VAEModule(vae()), CollapseMonitor()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[monitor], log_every_n_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader())
    assert {"active_units", "kl", "mutual_information"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_run_resumes_within_an_epoch_and_at_its_end(after, tmp_path):
    def run(epochs, *callbacks, resumed=None) -> pl.Trainer:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=[CollapseMonitor(), *callbacks], log_every_n_steps=50,
            enable_checkpointing=bool(callbacks),
        )  # fmt: skip
        trainer.fit(VAEModule(vae()), loader(), ckpt_path=resumed)
        return trainer

    run(1, pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=after, save_top_k=-1))
    for epochs in (1, 2):
        trainer = run(epochs, resumed=str(tmp_path / f"step={after}.ckpt"))
        assert trainer.global_step == 4 * epochs
    assert trainer.callback_metrics["mutual_information"] <= trainer.callback_metrics["kl"]
