"""gumbel_softmax: a relaxed one-hot sample of a categorical variable."""

import functools

import torch
import torch.nn.functional as F

from fastkl import reference
from fastkl.ops.gumbel_softmax import gumbel_softmax

from harness import Case, leaves


def cases(device, quick):
    seed = torch.tensor(0, device=device)
    for n, k in [(128, 32), (4096, 512)] if quick else [(128, 32), (4096, 512), (256, 65536)]:
        for dtype in (torch.float32, torch.bfloat16):
            for hard in (False, True):
                settings = {"tau": 0.7, "hard": hard}
                same_noise = tuple(
                    functools.partial(f, seed=seed, **settings) for f in (reference.gumbel_softmax, gumbel_softmax)
                )
                name = f"{n} x {k} {str(dtype).removeprefix('torch.')} {'hard' if hard else 'soft'}"
                eager, ours = (functools.partial(f, **settings) for f in (F.gumbel_softmax, gumbel_softmax))
                yield Case(name, leaves(device, (n, k), dtype=dtype), eager, ours, same_noise)
