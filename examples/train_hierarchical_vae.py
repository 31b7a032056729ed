"""A hierarchical VAE of digits: two latents, and a prior of the lower one that depends on the upper one.

p(x, z1, z2) = p(x | z1) p(z1 | z2) N(z2; 0, I), with posteriors q(z2 | x) and q(z1 | x, z2)

python examples/train_hierarchical_vae.py [--steps 2000]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastkl

LOWER, UPPER = 16, 8

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=2000)
steps = options.parse_args().steps

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pixels = torch.from_numpy(load_digits().images > 7).float().flatten(1)  # [1797, 64], black or white
pixels = pixels[torch.randperm(len(pixels))].to(device)
train, test = pixels[:1438], pixels[1438:]


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, outputs))


# A network of a distribution gives means and log-variances together.
model = nn.ModuleDict({
    "posterior of z1": network(64 + UPPER, 2 * LOWER), "posterior of z2": network(64, 2 * UPPER),
    "prior of z1": network(UPPER, 2 * LOWER), "decoder": network(LOWER, 64),
}).to(device)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def terms(x):
    """(ln p(x | z1), KL of z1, KL of z2) of each datum, in nats."""
    mu2, logvar2 = model["posterior of z2"](x).chunk(2, dim=1)
    z2, kl2 = fastkl.rsample_kl(mu2, logvar2)
    mu1, logvar1 = model["posterior of z1"](torch.cat([x, z2], dim=1)).chunk(2, dim=1)
    z1 = fastkl.rsample_normal(mu1, logvar1)
    prior_mu, prior_logvar = model["prior of z1"](z2).chunk(2, dim=1)
    kl1 = fastkl.kl_normal(mu1, logvar1, prior_mu, prior_logvar)  # of two Gaussians, both learned
    return fastkl.bernoulli_log_prob(x, model["decoder"](z1)), kl1, kl2


for step in range(1, steps + 1):
    x = train[torch.randint(len(train), (64,), device=device)]
    log_likelihood, kl1, kl2 = terms(x)
    weight = min(1.0, step / (0.3 * steps))  # a KL warm-up: without it the posterior of z2 collapses
    loss = (weight * (kl1 + kl2) - log_likelihood).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 500 == 0 or step == steps:
        with torch.no_grad():
            log_likelihood, kl1, kl2 = (term.mean().item() for term in terms(test))
        print(f"step {step}: test ELBO {log_likelihood - kl1 - kl2:.2f} nats, KL of z1 {kl1:.2f} and of z2 {kl2:.2f}")

with torch.no_grad():  # new digits, from the top
    z1 = fastkl.rsample_normal(*model["prior of z1"](torch.randn(10, UPPER, device=device)).chunk(2, dim=1))
    samples = model["decoder"](z1).sigmoid().view(10, 8, 8)
