"""fastkl's reference loop under accelerate: `python with_accelerate.py`, or `accelerate launch with_accelerate.py`.

Needs: pip install accelerate ".[train]". In mixed precision accelerate casts the outputs of a model to float32; the
posterior among them stays a DiagonalNormal.
"""

import tempfile
from pathlib import Path

from accelerate import Accelerator

from fastkl.vae import data, parallel
from fastkl.vae.loop import train
from fastkl.vae.progress import Display
from fastkl.vae.run import start
from fastkl.vae.settings import Settings

accelerator = Accelerator(cpu=True, mixed_precision="bf16")
settings = Settings(steps=200, hidden=64, latent=8, batch_size=64, checkpoint_every=1000, device="cpu")
with tempfile.TemporaryDirectory() as folder:
    run = start(settings, data.load(settings), parallel.Ranks(), Path(folder))
    run.objective, run.optimizers["autoencoder"] = accelerator.prepare(run.objective, run.optimizers["autoencoder"])
    train(run, Display())
    step, elbo, kl, reconstruction = run.history["train"][-1]
print(f"step {step}: ELBO {elbo:.2f}, KL {kl:.2f}, reconstruction {reconstruction:.2f} nats")
