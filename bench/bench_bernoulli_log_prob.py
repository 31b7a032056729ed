"""bernoulli_log_prob: the reconstruction term of binary images, and with importance samples."""

import torch
from torch.nn import functional as F

import fastkl

from harness import Case, leaves


def formula(logits, x):
    x = x.expand(logits.shape)
    return -F.binary_cross_entropy_with_logits(logits.float(), x.float(), reduction="none").sum(-1)


def cases(device, quick):
    sizes = [(128, 784), (1024, 784)] if quick else [(128, 784), (4096, 784), (256, 3 * 128 * 128)]
    for n, d in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.rand(n, d, generator=torch.Generator().manual_seed(2)).to(device)
            name = f"{n} x {d} {str(dtype).removeprefix('torch.')}"
            yield data_case(name, leaves(device, (n, d), dtype=dtype), x)
    samples, n, d = (8, 64, 784) if quick else (50, 128, 784)
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(2)).to(device)
    yield data_case(f"{samples} samples x {n} x {d}", leaves(device, (samples, n, d)), x)


def data_case(name, inputs, x):
    """The data want no gradient."""
    return Case(
        name,
        inputs,
        lambda logits: formula(logits, x),
        lambda logits: fastkl.bernoulli_log_prob(logits, x, event_ndim=1),
    )
