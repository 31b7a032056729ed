"""Reparameterised sampling without a KL: 2R + 1W forward, 2R + 2W backward, by the kernels of rsample_kl."""

from __future__ import annotations

from fastkl.kernels.rsample_kl import launch_bwd, launch_fwd


def fwd(q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream):
    settings = (scale, low, high)
    return launch_fwd(q, seed, eps, num_samples, packed_dim, [], None, settings, stream, with_kl=False)[0]


def bwd(dz, q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream):
    settings = (scale, low, high, live)
    return launch_bwd(dz, None, q, seed, eps, num_samples, packed_dim, [], None, settings, stream)
