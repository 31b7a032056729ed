"""mmd: squared discrepancy of two samples, seven scales, against the N x M matrices of the usual code."""

import torch

import fastkl

from harness import Case, leaves

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def squares(a, b):
    """Distances by a product of matrices, as torch.cdist takes them for many points."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def formula(kernel):
    def mean(a, b, own):
        t = squares(a, b) / (2 * a.shape[1])
        k = sum(s / (s + t) if kernel == "imq" else torch.exp(-t / s) for s in SCALES)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1)) if own else k.mean()

    def mmd(x, y):
        x, y = x.float(), y.float()
        return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)

    return mmd


def shifted(inputs):
    """Two samples that differ: of the same distribution the eager formula's gradient is mostly rounding."""
    with torch.no_grad():
        inputs[1] += 1
    return inputs


def cases(device, quick):
    for n, d in [(128, 32), (512, 64)] if quick else [(128, 32), (1024, 64), (4096, 64)]:
        for kernel in ("imq", "rbf"):
            inputs = shifted(leaves(device, (n, d), (n, d)))
            yield Case(
                f"{n} x {d} {kernel}", inputs, formula(kernel), lambda x, y, k=kernel: fastkl.mmd(x, y, kernel=k)
            )
    n, d = (128, 32) if quick else (1024, 64)
    x, y = shifted(leaves(device, (n, d), (n, d)))
    y = y.detach()
    yield Case(f"{n} x {d} imq, y fixed", [x], lambda x: formula("imq")(x, y), lambda x: fastkl.mmd(x, y))
