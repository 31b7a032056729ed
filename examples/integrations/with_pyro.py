"""A VAE in Pyro whose prior is a mixture: `python with_pyro.py`. Needs: pip install pyro-ppl."""

import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import fastkl.integrations.pyro

N, X, D, K = 256, 64, 16, 300
data = torch.rand(N, X, generator=torch.Generator().manual_seed(0))


def train(steps: int = 5) -> tuple[float, float]:
    """(the last loss per datum, CPU milliseconds of a step)"""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    encoder, decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        means = pyro.param("means", lambda: torch.randn(K, D))
        components = dist.Normal(means, torch.ones(())).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(K)), components))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        mean, log_std = encoder(x).chunk(2, 1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, log_std.exp()).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    began = time.process_time()
    losses = [svi.step(data) / N for _ in range(steps)]
    return losses[-1], (time.process_time() - began) / steps * 1e3


print("Pyro:   loss {:.3f}, {:.1f} ms a step".format(*train()))
with fastkl.integrations.pyro.enable():
    train(1)  # compiles the C loops at the first call
    print("fastkl: loss {:.3f}, {:.1f} ms a step".format(*train()))
