"""What the tests of the priors share: one of each, a mixture and a posterior with every parameter at random."""

from __future__ import annotations

import pytest
import torch

import fastkl
from fastkl import priors, reference
from fastkl.priors import GaussianMixture

from helpers import DEVICE

COVARIANCES = ("diag", "spherical", "tied", "full")
K, D = 4, 3


def mixture(covariance: str = "diag", components: int = K, dim: int = D) -> GaussianMixture:
    """Every parameter at random, in float64."""
    torch.manual_seed(5)
    prior = GaussianMixture(components, dim, covariance).double().to(DEVICE)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return prior


def posterior(count: int = 6, dim: int = D) -> fastkl.DiagonalNormal:
    torch.manual_seed(6)
    leaves = [torch.randn(count, dim, dtype=torch.float64).to(DEVICE).requires_grad_() for _ in range(2)]
    return fastkl.DiagonalNormal(*leaves)


def choice_noise(*shape: int) -> torch.Tensor:
    """Standard Gumbel noise, always the same."""
    return reference.gumbel_noise(torch.tensor(3, device=DEVICE), shape).double()


def flow() -> priors.FlowPrior:
    zuko = pytest.importorskip("zuko")
    return priors.FlowPrior(zuko.flows.MAF(D, transforms=2, hidden_features=(8,)))


MAKE = {
    "standard": lambda: priors.StandardNormal(D),
    "normal": lambda: priors.LearnedNormal(D),
    **{name: lambda name=name: GaussianMixture(K, D, name) for name in COVARIANCES},
    "vamp": lambda: priors.VampPrior(torch.rand(K, 5), torch.nn.Linear(5, 2 * D), transform=torch.sigmoid),
    "flow": flow,
}
every_prior = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
