"""Reparameterised sampling without a KL: 2R + 1W forward, 2R + 2W backward, by the kernels of rsample_kl."""

from __future__ import annotations

from fastkl.kernels.normal.rsample_kl import launch_bwd, launch_fwd


def fwd(mu, parameter, eps, seed, event_ndim, scale, low, high, live, num_samples, stream):
    inputs = (mu, parameter, None, None)
    return launch_fwd(inputs, eps, seed, None, scale, low, high, num_samples, stream, with_kl=False)[0]


def bwd(dz, mu, parameter, eps, seed, dmu, dparameter, event_ndim, *settings) -> None:
    launch_bwd((dz, None, mu, parameter, None, None, eps), (dmu, dparameter, None, None), seed, None, *settings)
