"""The table "Range" of docs/architecture.md: inside, value and gradients are right; outside, right or not finite.

Exact values come from independent formulas in float64.
"""

import re
from pathlib import Path

import pytest
import torch

import fastkl

import fuzz_oracle as oracle
from helpers import DEVICE, implementation, leaf

PAGE = (Path(__file__).parents[1] / "docs/architecture.md").read_text()
TABLE = {
    match[0]: (float(match[1]), float(match[2]))
    for match in re.findall(r"^\| (.+?) \| (-?\d+) to (-?\d+) \|", PAGE.replace("−", "-").replace("`", ""), re.M)
}
GENERATOR = torch.Generator().manual_seed(0)
Z, MU = (torch.randn(4, 2, generator=GENERATOR) for _ in range(2))
MEANS, LOGITS, ZERO = torch.randn(3, 2, generator=GENERATOR), torch.randn(3, generator=GENERATOR), torch.zeros(4, 2)
EPS = torch.randn(4, 2, generator=GENERATOR)


def last_row(v):
    return torch.cat([ZERO[:-1], torch.full((1, 2), v)])


def own(v):
    return {"mu": MU, "logvar": last_row(v)}


def mixture(v):
    return {"z": Z, "logits": LOGITS, "means": MEANS, "logvars": torch.full((3, 2), v)}


def bounded(v):
    return {"mu": MU, "logvar": ZERO, **{name: t for name, t in mixture(v).items() if name != "z"}}


def sampled(mu, logvar):
    return mu + torch.exp(0.5 * logvar) * EPS


def kl(**t):
    return oracle.kl_elements(*t.values()).sum(-1)


def joint(t):
    return oracle.joint(*t.values())


# By the table's first column: the op, its formula, and what it is called with.
ROWS = {
    "kl_normal, logvar": (fastkl.kl_normal, kl, own),
    "kl_normal, prior_logvar": (
        fastkl.kl_normal, kl, lambda v: {"mu": MU, "logvar": ZERO, "prior_mu": Z, "prior_logvar": last_row(v)}
    ),
    "rsample_normal, logvar": (lambda **t: fastkl.rsample_normal(**t, eps=EPS.to(DEVICE)), sampled, own),
    "wasserstein2_normal, logvar": (
        fastkl.wasserstein2_normal, lambda **t: oracle.wasserstein2_elements(*t.values()).sum(-1), own
    ),
    "normal_log_prob, logvar": (
        fastkl.normal_log_prob, lambda **t: oracle.normal_terms(*t.values()).sum(-1),
        lambda v: {"x": Z, "mean": MU, "logvar": last_row(v)},
    ),
    "mmd_normal, logvar": (
        fastkl.mmd_normal, lambda **t: oracle.mmd_normal(**t, scales=fastkl.reference.MMD_SCALES, unbiased=True), own
    ),
    "total_correlation, logvar": (
        lambda **t: fastkl.total_correlation(**t, dataset_size=9),
        lambda **t: oracle.total_correlation(**t, dataset_size=9, weights="mss"), lambda v: {"z": Z, **own(v)},
    ),
    "gmm_log_prob, all logvars": (fastkl.gmm_log_prob, lambda **t: joint(t).logsumexp(-1), mixture),
    "gmm_responsibilities, all logvars": (
        fastkl.gmm_responsibilities, lambda **t: torch.log_softmax(joint(t), -1), mixture
    ),
    "kl_gmm upper, all logvars": (
        lambda **t: fastkl.kl_gmm(**t, method="upper"), lambda **t: oracle.kl_gmm(*t.values(), method="upper"), bounded
    ),
    "kl_gmm lower, all logvars": (
        lambda **t: fastkl.kl_gmm(**t, method="lower"), lambda **t: oracle.kl_gmm(*t.values(), method="lower"), bounded
    ),
}  # fmt: skip


def results(function, tensors):
    found = function(**tensors)
    outputs = list(found) if isinstance(found, (tuple, list)) else [found]
    ones = [torch.ones_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(tensors.values()), ones, allow_unused=True)
    return [t if t is None else t.detach().double().cpu() for t in (*outputs, *gradients)]


@pytest.mark.parametrize("way", ["torch", "native", "triton"])
@pytest.mark.parametrize("row", ROWS)
def test_the_table_says_where_numbers_are_right(row, way):
    op, formula, inputs = ROWS[row]
    low, high = TABLE[row]
    for v in (low, high, low - 10.0, low - 100.0, high + 10.0, high + 200.0):
        tensors = inputs(v)
        with implementation(way):
            found = results(op, {name: leaf(t.clone()) for name, t in tensors.items()})
        exact = results(formula, {name: t.double().requires_grad_() for name, t in tensors.items()})
        for actual, right in zip(found, exact, strict=True):
            if actual is None or right is None:
                continue
            within = low <= v <= high
            wrong = ~torch.isclose(actual, right, rtol=1e-3, atol=2e-5) & (actual.isfinite() | within)
            overflow = (right.abs() > torch.finfo(torch.float32).max) & (actual == right.sign() * torch.inf)
            assert not (wrong & ~overflow).any(), (v, actual, right)


def test_every_row_of_the_table_is_tested():
    assert set(TABLE) == set(ROWS)
