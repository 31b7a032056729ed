"""A VAE written with torch.distributions, with a mixture as its prior: `python with_distributions.py`.

Needs only fastkl. The model's code stays as it is; after one line, fastkl computes the density of its prior.
"""

import time

import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import fastkl.integrations.distributions

K, D = 300, 16


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 2 * D), nn.Linear(D, 64)
        self.means, self.log_std = nn.Parameter(torch.randn(K, D)), nn.Parameter(torch.zeros(K, D))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        mean, log_std = self.encoder(x).chunk(2, 1)
        q = Independent(Normal(mean, log_std.exp()), 1)
        p = MixtureSameFamily(Categorical(torch.ones(K)), Independent(Normal(self.means, self.log_std.exp()), 1))
        z = q.rsample()
        return ((self.decoder(z) - x).square().sum(1) + q.log_prob(z) - p.log_prob(z)).mean()


def train(steps: int = 5) -> tuple[float, float]:
    """(the last loss, CPU milliseconds of a step)"""
    torch.manual_seed(0)
    vae, x = VAE(), torch.rand(256, 64)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    began = time.process_time()
    for _ in range(steps):
        loss = vae.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), (time.process_time() - began) / steps * 1e3


print("torch:  loss {:.3f}, {:.1f} ms a step".format(*train()))
with fastkl.integrations.distributions.enable():
    train(1)  # compiles the C loops at the first call
    print("fastkl: loss {:.3f}, {:.1f} ms a step".format(*train()))
