"""A VAE under the Trainer of transformers: `python with_transformers.py`. Needs: pip install transformers accelerate.

The Trainer needs a model whose output is a dict with "loss". It passes a `DiagonalNormal` in it on unchanged.
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import fastkl


class VAE(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(12, 8), torch.nn.Linear(4, 12)

    def forward(self, x: torch.Tensor, return_loss: bool = True) -> dict:  # without the name, evaluate has no loss
        q = fastkl.DiagonalNormal.from_packed(self.encoder(x))
        z, kl = q.rsample_kl()
        loss = (kl - fastkl.normal_log_prob(x, self.decoder(z), 0.0)).mean()
        return {"loss": loss, "posterior": q}


torch.manual_seed(0)
x = torch.randn(256, 2) @ torch.randn(2, 12)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=5, per_device_train_batch_size=32, learning_rate=1e-2, bf16=True, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False, label_names=[],
    )  # fmt: skip
    vae = VAE()
    before = vae(x)["loss"].item()
    rows = [{"x": row} for row in x]
    trainer = Trainer(vae, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
out = vae(x)
print(f"loss {before:.2f} -> {after:.2f}, KL {out['posterior'].kl().mean().item():.2f} nats")
