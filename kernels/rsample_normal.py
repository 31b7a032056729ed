"""Reparameterised sampling without a KL: 2R + 1W forward, 2R + 2W backward, by the kernels of rsample_kl."""

from __future__ import annotations

from fastkl.kernels._launch import replayed
from fastkl.kernels._layout import layout, unpack
from fastkl.kernels.rsample_kl import launch_bwd, launch_fwd


def event_ndim(tensors) -> int:
    """Sampling has no event. The fewest rows whose columns are one run of memory, so that Philox calls are not wasted
    on the ends of short rows; below 2^31 columns, which are counted in 32 bits."""
    ndim = tensors[0].dim()
    for candidate in range(ndim, 0, -1):
        found = layout(tensors, candidate, reorder=False)
        if found is not None and found.nested < 2 and found.columns < 2**31:
            return candidate
    return min(1, ndim)


@replayed
def fwd(q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream):
    settings = (scale, low, high, live)
    ndim = event_ndim(unpack(q, packed_dim))
    return launch_fwd(q, seed, eps, num_samples, packed_dim, [], ndim, settings, stream, with_kl=False)[0]


@replayed
def bwd(dz, q, seed, eps, num_samples, packed_dim, scale, low, high, live, stream):
    settings = (scale, low, high, live)
    first = dz if num_samples is None else dz[0] if num_samples else unpack(q, packed_dim)[0]
    ndim = event_ndim([*unpack(q, packed_dim), first])
    return launch_bwd(dz, None, q, seed, eps, num_samples, packed_dim, [], ndim, settings, stream)
