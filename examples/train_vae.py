"""A variational autoencoder of digits in sixty lines: copy it, and change the networks and the data.

python examples/train_vae.py [--steps 2000]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastkl

LATENT = 16

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=2000)
steps = options.parse_args().steps

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pixels = torch.from_numpy(load_digits().images).float().flatten(1) / 16  # [1797, 64], in [0, 1]
pixels = pixels[torch.randperm(len(pixels))].to(device)
train, test = pixels[:1438], pixels[1438:]

# The encoder's last layer gives means and log-variances together.
encoder = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 2 * LATENT))
decoder = nn.Sequential(nn.Linear(LATENT, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))
encoder, decoder = encoder.to(device), decoder.to(device)
optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def evidence_lower_bound(x):
    """The ELBO of each datum, in nats."""
    q = fastkl.DiagonalNormal.from_packed(encoder(x), dim=1)
    z, kl = q.rsample_kl()
    return fastkl.bernoulli_log_prob(x, decoder(z)) - kl


def log_prob(x, num_samples=100):
    """The importance-weighted bound on ln p(x) of each datum, in nats."""
    q = fastkl.DiagonalNormal.from_packed(encoder(x), dim=1)
    z = q.rsample(num_samples=num_samples)  # [num_samples, N, LATENT]
    log_likelihood = fastkl.bernoulli_log_prob(x, decoder(z), event_ndim=1)
    log_prior = fastkl.normal_log_prob(z, 0.0, 0.0, event_ndim=1)
    return fastkl.iwae(log_likelihood + log_prior - q.log_prob(z))


for step in range(1, steps + 1):
    x = train[torch.randint(len(train), (64,), device=device)]
    loss = -evidence_lower_bound(x).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 500 == 0 or step == steps:
        with torch.no_grad():
            print(f"step {step}: test ELBO {evidence_lower_bound(test).mean():.2f} nats")

with torch.no_grad():
    print(f"test log p(x) at least {log_prob(test).mean():.2f} nats")
    samples = decoder(torch.randn(10, LATENT, device=device)).sigmoid().view(10, 8, 8)  # new digits
