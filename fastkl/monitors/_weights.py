"""Monitors of weights: of the components of a mixture, and of importance-weighted samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.monitors._monitor import Monitor, State
from fastkl.ops import _arguments as arguments
from fastkl.ops.importance.iwae import effective_sample_size
from fastkl.ops.mixture.gmm_moments import GMMMoments
from fastkl.priors.mixture import Usage, used


class ComponentUsage(Monitor):
    """The use of a mixture's components by the data.

    >>> import torch, fastkl
    >>> from fastkl import monitors
    >>> usage, means = monitors.ComponentUsage(), torch.tensor([[0.0], [20.0], [40.0]])
    >>> for z in torch.tensor([[[0.0], [0.5]], [[20.0], [21.0]]]):
    ...     usage.update(fastkl.gmm_moments(z, torch.zeros(3), means))
    >>> usage.compute().shares, usage.compute().used
    (tensor([0.5000, 0.5000, 0.0000], dtype=torch.float64), 2)
    """

    @torch.no_grad()
    def update(self, responsibilities: Tensor | GMMMoments) -> None:
        """Add the result of `fastkl.gmm_moments`, which needs no tensor of size data times components; or ln p(k | z)
        [*batch, K], from `fastkl.gmm_responsibilities`."""
        if isinstance(responsibilities, GMMMoments):
            count, sums = responsibilities.log_prob.numel(), responsibilities.counts.double()
        else:
            arguments.check_tensors(responsibilities=responsibilities)
            if responsibilities.dim() == 0:
                raise ValueError("responsibilities must be ln p(k | z) [*batch, K], got a single value")
            rows = responsibilities.detach().reshape(-1, responsibilities.shape[-1])
            count, sums = len(rows), rows.exp().sum(0, dtype=torch.float64)
        self.add(State(count, (sums,)))

    def compute(self) -> Usage:
        """(shares [K], their entropy in nats, number of used components), as a prior's `usage` of all the data."""
        sums = self.everything().values[0]
        shares = sums / sums.sum()
        return Usage(shares, torch.special.entr(shares).sum(), int(used(shares).sum()))


class EffectiveSampleSize(Monitor):
    """The mean over the data of `fastkl.effective_sample_size`, (sum_l w_l)^2 / sum_l w_l^2, also as a share of L.

    >>> import math, torch
    >>> from fastkl import monitors
    >>> size = monitors.EffectiveSampleSize()
    >>> size.update(torch.tensor([[0.0, 0.0], [0.0, -math.inf]]))  # two samples for each of two data
    >>> size.compute(), size.fraction()
    (tensor(1.5000, dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """

    @torch.no_grad()
    def update(self, log_w: Tensor, dim: int = 0) -> None:
        """Add log-weights ln p(x, z_l) - ln q(z_l | x) [L, *batch], with samples along `dim`."""
        sizes = effective_sample_size(log_w.detach() if isinstance(log_w, Tensor) else log_w, dim).double()
        self.add(State(sizes.numel(), (sizes.sum(), sizes.sum() / log_w.shape[dim])))

    def compute(self) -> Tensor:
        """The mean effective sample size [], from 1 to L."""
        return self.mean()

    def fraction(self) -> Tensor:
        """The mean of the effective sample size divided by L: at most 1, and comparable between different L."""
        count, (_, parts) = self.everything()
        return parts / count
