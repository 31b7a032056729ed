"""Two models of Pythae: `python with_pythae.py`. Needs: pip install pythae."""

import time

import torch
from pythae.models import VAMP, WAE_MMD, VAMPConfig, WAE_MMD_Config

import fastkl.integrations.pythae

x = torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def train(kind, config, steps: int = 3) -> tuple[float, float]:
    """(the last loss, CPU milliseconds of a step). Pythae's own trainers call the model in the same way."""
    torch.manual_seed(0)
    model = kind(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    began = time.process_time()
    for _ in range(steps):
        loss = model({"data": x}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), (time.process_time() - began) / steps * 1e3


for kind, config in (
    (WAE_MMD, WAE_MMD_Config(input_dim=(1, 28, 28), latent_dim=16)),
    (VAMP, VAMPConfig(input_dim=(1, 28, 28), latent_dim=16, number_components=500)),
):
    print("{}: Pythae loss {:.3f}, {:.0f} ms a step".format(kind.__name__, *train(kind, config)))
    with fastkl.integrations.pythae.enable():
        train(kind, config, 1)  # compiles the C loops at the first call
        print("{}: fastkl loss {:.3f}, {:.0f} ms a step".format(kind.__name__, *train(kind, config)))
