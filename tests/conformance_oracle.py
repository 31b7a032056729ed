"""The exact answers of fastkl.conformance's questions, by mpmath with 50 digits: `python tests/conformance_oracle.py`
prints them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import mpmath
import torch
from mpmath import mp, mpf

mp.dps = 50


def numbers(tensor: torch.Tensor) -> list[mpf]:
    return [mpf(value) for value in tensor.double().flatten().tolist()]


def rows(*tensors: torch.Tensor) -> Iterator[list[list[mpf]]]:
    return ([numbers(row) for row in several] for several in zip(*tensors))


def kl_of_element(mu, logvar, prior_mu=0, prior_logvar=0) -> mpf:
    x = logvar - prior_logvar
    return (mpmath.exp(x) - 1 - x + (mu - prior_mu) ** 2 * mpmath.exp(-prior_logvar)) / 2


def normal(z, mean, std) -> mpf:
    return -(((z - mean) / std) ** 2 + mpmath.log(2 * mp.pi)) / 2 - mpmath.log(std)


def kl(mu, logvar):
    return [sum(map(kl_of_element, *row)) for row in rows(mu, logvar)]


def mean_kl(mu, logvar):
    return [sum(kl(mu, logvar)) / len(mu)]


def kl_of_std(mu, std):
    return [sum(kl_of_element(m, 2 * mpmath.log(s)) for m, s in zip(*row)) for row in rows(mu, std)]


def kl_of_two(*tensors):
    return [sum(map(kl_of_element, *row)) for row in rows(*tensors)]


def mixture(z, weights, means, stds):
    components = list(zip(numbers(weights), *(list(map(numbers, t)) for t in (means, stds))))
    return [
        mpmath.log(sum(w * mpmath.exp(sum(map(normal, x, m, s))) for w, m, s in components if w))
        for (x,) in rows(z)
    ]  # fmt: skip


def iwae(log_w):
    flat = log_w.flatten(0, 1)
    return [mpmath.log(sum(map(mpmath.exp, row)) / len(row)) for (row,) in rows(flat)]


def decomposition(z, mu, logvar, dataset_size):
    """Means over the batch of mutual information, total correlation and dimension-wise KL, by stratified sampling."""
    n, m = len(z), len(z) - 1
    z, mu, std = (list(map(numbers, t)) for t in (z, mu, (0.5 * logvar.double()).exp()))
    parts = [[], [], []]
    for i in range(n):
        weight = [mpf(1) / m] * n
        weight[i], weight[(i + 1) % n] = mpf(1) / dataset_size, mpf(dataset_size - m) / (dataset_size * m)
        each = [list(map(normal, z[i], mu[j], std[j])) for j in range(n)]
        joint = mpmath.log(sum(w * mpmath.exp(sum(row)) for w, row in zip(weight, each)))
        product = sum(mpmath.log(sum(w * mpmath.exp(x) for w, x in zip(weight, column))) for column in zip(*each))
        prior = sum(normal(x, mpf(0), mpf(1)) for x in z[i])
        for part, value in zip(parts, (sum(each[i]) - joint, joint - product, product - prior)):
            part.append(value)
    return [sum(part) / n for part in parts]


def choice(logits, tau):
    return [mpf(1)]


def mmd(x, y):
    """The unbiased squared MMD with the kernel 1 / (1 + d^2 / 2)."""

    def mean(pairs):
        pairs = list(pairs)
        return sum(1 / (1 + sum((a - b) ** 2 for a, b in zip(p, q)) / 2) for p, q in pairs) / len(pairs)

    x, y = (list(map(numbers, t)) for t in (x, y))
    own = [mean(itertools.permutations(points, 2)) for points in (x, y)]
    return [sum(own) - 2 * mean(itertools.product(x, y))]


def transport(x, y, blur):
    """W_2^2 / 2 of equally many points on a line: the divergence's limit, and exact if one set is the other shifted."""
    pairs = zip(sorted(numbers(x)), sorted(numbers(y)))
    return [sum((a - b) ** 2 for a, b in pairs) / len(x) / 2]


def one_dimension(x, y):
    pairs = zip(sorted(numbers(x)), sorted(numbers(y)))
    return [sum((a - b) ** 2 for a, b in pairs) / len(x)]


def exact(case: Any) -> list[float]:
    return [float(value) for value in globals()[case.question.replace(" ", "_")](*case.arguments())]


if __name__ == "__main__":
    from fastkl.conformance.cases import CASES

    for case in CASES:
        print(case.question, "|", case.name, tuple(exact(case)))
