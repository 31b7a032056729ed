"""A VAE in Lightning, watched for collapse: `python with_lightning.py`. Needs: pip install lightning.

The second run weighs the KL so much that the posterior collapses: the callback warns of it, and names remedies.
"""

import lightning.pytorch as pl
import torch

import fastkl
from fastkl.integrations.lightning import CollapseMonitor, VAEModule
from fastkl.vae.model import VAE, mlp

torch.manual_seed(0)
x = torch.randn(256, 2) @ torch.randn(2, 12) + 0.1 * torch.randn(256, 12)


def train(beta: float) -> dict[str, float]:
    encoder, decoder, latent_shape = mlp((12,), 3, 16, 1)  # or any module with posterior(x) and log_likelihood(z, x)
    vae = VAE(encoder, decoder, (12,), latent_shape, "normal")
    module = VAEModule(vae, fastkl.priors.LearnedNormal(3), beta=beta, learning_rate=1e-2)
    trainer = pl.Trainer(
        max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=4, callbacks=[CollapseMonitor(grace=6)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=64, shuffle=True))
    return {name: trainer.callback_metrics[name].item() for name in ("active_units", "kl", "mutual_information")}


print("beta = 1:", train(1.0))
print("beta = 1000:", train(1000.0))
