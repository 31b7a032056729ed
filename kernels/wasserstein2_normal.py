"""Squared 2-Wasserstein distance of diagonal Gaussians, by the kernels of kl_normal with other terms."""

from __future__ import annotations

import torch

from fastkl.kernels import kl_normal


def fwd(mu, parameter, prior, *settings) -> torch.Tensor:
    return kl_normal.fwd([mu, parameter], -1, prior, *settings, "wasserstein2")


def bwd(ddistance, mu, parameter, prior, *settings) -> list[torch.Tensor]:
    return kl_normal.bwd(ddistance, [mu, parameter], -1, prior, *settings, "wasserstein2")
