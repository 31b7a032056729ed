"""rsample_normal: the reparameterised sample mu + sigma eps."""

import functools

import torch

import fastkl
from fastkl import reference

from harness import Case, leaves


def formula(mu, logvar):
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def cases(device, quick):
    seed = torch.tensor(0, device=device)
    same_noise = tuple(functools.partial(f, seed=seed) for f in (reference.rsample_normal, fastkl.rsample_normal))
    for n, d in [(128, 32), (4096, 512)] if quick else [(128, 32), (4096, 512), (256, 65536)]:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = leaves(device, (n, d), (n, d), dtype=dtype)
            name = f"{n} x {d} {str(dtype).removeprefix('torch.')}"
            yield Case(name, inputs, formula, fastkl.rsample_normal, same_noise)
