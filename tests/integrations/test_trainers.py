"""Training loops of other libraries around a model whose output holds a posterior."""

import pytest
import torch

import fastkl
from fastkl import DiagonalNormal

D = 4


class VAE(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(6, 2 * D), torch.nn.Linear(D, 6)

    def forward(self, x, return_loss=True, **ignored):
        q = DiagonalNormal.from_packed(self.encoder(x))
        z, kl = q.rsample_kl(seed=0)
        loss = ((self.decoder(z) - x).square().sum(1) + kl).mean()
        return {"loss": loss, "posterior": q, "z": z}


def data() -> torch.Tensor:
    return torch.linspace(-1, 1, 48).view(8, 6)


def test_a_posterior_survives_accelerate():
    """Which casts the tensors of an output to float32, and leaves alone what it does not know."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    plain = VAE()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), 0.1))
    out = model(data())
    assert out["z"].dtype == torch.float32
    assert isinstance(out["posterior"], DiagonalNormal)
    assert out["posterior"].kl().shape == (8,)
    before = [parameter.clone() for parameter in plain.parameters()]
    accelerator.backward(out["loss"])
    optimizer.step()
    assert all((new - old).abs().max() > 0 for new, old in zip(plain.parameters(), before))
    gathered = accelerate.utils.send_to_device({"q": out["posterior"]}, "cpu")
    assert torch.equal(gathered["q"].kl(), out["posterior"].kl())


def test_the_reference_loop_runs_under_accelerate(tmp_path):
    """The same run bit for bit; and in mixed precision, which casts the objective's outputs."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    from fastkl.vae import data, parallel
    from fastkl.vae.loop import train
    from fastkl.vae.progress import Display
    from fastkl.vae.run import start
    from fastkl.vae.settings import Settings

    settings = Settings(steps=8, hidden=16, latent=3, batch_size=64, log_every=2, device="cpu")

    def losses(precision: str | None) -> list[list[float]]:
        run = start(settings, data.load(settings), parallel.Ranks(), tmp_path)
        if precision is not None:
            accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
            optimizer = run.optimizers["autoencoder"]
            run.objective, run.optimizers["autoencoder"] = accelerator.prepare(run.objective, optimizer)
        assert train(run, Display())
        accelerate.state.AcceleratorState._reset_state(True)
        return run.history["train"]

    plain = losses(None)
    assert len(plain) == 4
    assert losses("no") == plain
    torch.testing.assert_close(torch.tensor(losses("bf16")), torch.tensor(plain), rtol=0.02, atol=0.1)


def test_a_posterior_survives_transformers_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = VAE()
    settings = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False, label_names=[], bf16=True,
    )  # fmt: skip
    rows = [{"x": row} for row in data()]
    trainer = transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [model(data()[half])["loss"].item() for half in (slice(4), slice(4, 8))]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / 2, rel=0.02)
    assert trainer.predict(rows, ignore_keys=["posterior"]).predictions.shape == (8, D)
    with torch.no_grad():
        assert isinstance(model(data())["posterior"], DiagonalNormal)


def test_lightning_moves_and_trains_a_posterior(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vae, self.prior = VAE(), fastkl.priors.LearnedNormal(D)

        def training_step(self, x, index):
            out = self.vae(x)
            return out["loss"] + self.prior.kl(out["posterior"]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    torch.manual_seed(0)
    module = Module()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=4))
    assert all((new - old).abs().max() > 0 for new, old in zip(module.parameters(), before))
