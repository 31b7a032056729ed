"""Squared 2-Wasserstein distance of diagonal Gaussians, by the kernels of kl_normal with other terms."""

from __future__ import annotations

import torch

from fastkl.kernels.normal import kl_normal


def fwd(*arguments) -> torch.Tensor:
    return kl_normal.fwd(*arguments, "wasserstein2")


def bwd(*arguments) -> None:
    kl_normal.bwd(*arguments, "wasserstein2")
