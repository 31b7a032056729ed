"""normal_log_prob: a variance for each element, and one learned variance (the sigma-VAE)."""

import math

import torch

import fastkl

from harness import Case, leaves


def formula(x, mean, logvar):
    mean, logvar = mean.float(), logvar.float()
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).pow(2) / logvar.exp()).sum(-1)


def cases(device, quick):
    sizes = [(128, 784), (1024, 784)] if quick else [(128, 784), (4096, 784), (256, 3 * 128 * 128)]
    for n, d in sizes:
        x = torch.rand(n, d, generator=torch.Generator().manual_seed(2)).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{n} x {d} {str(dtype).removeprefix('torch.')}"
            yield data_case(name, leaves(device, (n, d), (n, d), dtype=dtype), x)
        yield data_case(f"{n} x {d} one variance", leaves(device, (n, d), ()), x)
    yield data_case(f"{n} x {d} a variance per dimension", leaves(device, (n, d), (d,)), x)


def data_case(name, inputs, x):
    """The data want no gradient."""
    return Case(
        name,
        inputs,
        lambda mean, logvar: formula(x, mean, logvar),
        lambda mean, logvar: fastkl.normal_log_prob(x, mean, logvar),
    )
