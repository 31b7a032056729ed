"""Reparameterised sampling without a KL: 2R + 1W forward, 2R + 2W backward, by the kernels of rsample_kl."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkl.kernels.normal.rsample_kl import launch_bwd, launch_fwd


def fwd(
    mu: Tensor, parameter: Tensor, eps: Tensor | None, seed: Tensor, event_ndim: int, scale: str, low: float,
    high: float, live: bool, num_samples: int | None, stream: int,
) -> Tensor:  # fmt: skip
    inputs = (mu, parameter, None, None)
    return launch_fwd(inputs, eps, seed, None, scale, low, high, num_samples, stream, with_kl=False)[0]


def bwd(
    dz: Tensor, mu: Tensor, parameter: Tensor, eps: Tensor | None, seed: Tensor, dmu: Tensor, dparameter: Tensor,
    event_ndim: int, *settings: Any,
) -> None:  # fmt: skip
    launch_bwd((dz, None, mu, parameter, None, None, eps), (dmu, dparameter, None, None), seed, None, *settings)
