"""A normalising flow as prior. The user constructs the flow, so its library is not imported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkl.ops import _arguments as arguments
from fastkl.ops import _sampling as sampling
from fastkl.ops._sampling import Seed
from fastkl.priors._prior import Prior, check_shape


class FlowPrior(Prior):
    """A normalising flow of the zuko library (`pip install zuko`), or any module whose flow() is a
    torch.distributions.Distribution over [D].

    The flow is a submodule and trains with the rest. Its KL is estimated by samples, which pass through the flow in one
    batch.

    Source: Rezende and Mohamed 2015, arXiv:1505.05770; Rozet and others, zuko, https://github.com/probabilists/zuko.

    >>> import torch, fastkl, zuko
    >>> prior = fastkl.priors.FlowPrior(zuko.flows.NSF(features=3, transforms=2, hidden_features=(32,)))
    >>> prior.kl(fastkl.DiagonalNormal(torch.zeros(8, 3), torch.zeros(8, 3)), num_samples=4).shape
    torch.Size([8])
    """

    def __init__(self, flow: nn.Module):
        super().__init__()
        if not isinstance(flow, nn.Module):
            raise TypeError(f"flow must be a torch.nn.Module, such as a zuko.flows.Flow, got {type(flow).__name__}")
        self.flow = flow

    def log_prob(self, z: Tensor) -> Tensor:
        arguments.check_tensors(z=z)
        density = self.flow()
        if z.dim() == 0 or z.shape[-1:] != density.event_shape:
            raise ValueError(f"z must be (*batch, {', '.join(map(str, density.event_shape))}), the flow's event, got "
                             f"{tuple(z.shape)}")  # fmt: skip
        if z.numel() == 0:  # torch.distributions' transforms fail on empty tensors
            return z.sum(-1)
        dtypes = [p.dtype for p in self.flow.parameters()]
        return density.log_prob(z.to(dtypes[0]) if dtypes else z)

    def rsample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        shape = check_shape(n)
        if seed is None:
            return self.flow().rsample(shape)
        own_seed = sampling.of_rank(seed)
        # A list: torch.compile has no way to hand a set over.
        own = list(dict.fromkeys(p.device for p in self.flow.parameters() if p.device.type not in ("cpu", "meta")))
        kind = own[0].type if own else "cuda"
        devices: list[torch.device] | list[int] = own
        if kind == "cuda" and torch.cuda.is_initialized():
            devices = list(range(torch.cuda.device_count()))  # manual_seed changes the generators of all devices
        with torch.random.fork_rng(devices, device_type=kind):
            torch.manual_seed(int(own_seed) if isinstance(own_seed, Tensor) else own_seed)
            return self.flow().rsample(shape)

    @torch.no_grad()
    def sample(self, n: int | Sequence[int], *, seed: Seed | None = None) -> Tensor:
        return self.rsample(n, seed=seed)

    def extra_repr(self) -> str:
        return ""
