"""mmd: squared discrepancy of two samples, seven scales, against the N x M matrices of the usual code."""

import fastkl
from bench.case import Case, leaves
from fastkl import reference

SIZES = ((128, 64), (512, 64), (4096, 64))
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

try:
    from pykeops.torch import LazyTensor
except ImportError:
    LazyTensor = None


def squares(a, b):
    """Squared distances by a matrix product, as in torch.cdist for many points."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def mean(a, b, own):
    t = squares(a, b) / (2 * a.shape[1])
    k = sum(s / (s + t) for s in SCALES)
    return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1)) if own else k.mean()


def formula(x, y):
    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def by_keops(x, y):
    def total(a, b):
        t = ((LazyTensor(a[:, None]) - LazyTensor(b[None])) ** 2).sum(-1) / (2 * a.shape[1])
        k = sum(s / (s + t) for s in SCALES)
        return k.sum(1).sum()

    def own(a):  # subtracts the pairs of a point with itself, at distance 0
        return (total(a, a) - len(a) * len(SCALES)) / (len(a) * (len(a) - 1))

    return own(x) + own(y) - 2 * total(x, y) / (len(x) * len(y))


def cases(device, quick):
    for n, d in [(128, 32)] if quick else SIZES:
        x, y = leaves(device, (n, d), (n, d))
        # Two different distributions: for equal ones the eager formula's gradient is mostly rounding error.
        inputs = [x, (y.detach() + 1).requires_grad_()]
        others = {"pykeops": by_keops} if LazyTensor else {}
        # The definition needs N x N x D differences. If they would fill the memory, the formula in float64 replaces it.
        truth = reference.mmd if n < 1000 else formula
        yield Case(f"{n} x {d}, seven scales", inputs, formula, fastkl.mmd, truth, others, every_count=True)
