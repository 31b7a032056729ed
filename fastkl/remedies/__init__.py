"""Remedies against posterior collapse: free bits, a capacity, balancing of groups.

    loss = (beta * remedies.free_bits(q, 0.25, per="batch") - log_likelihood).mean()

Each replaces the KL in the loss. Numbers in nats may be tensors, which change from step to step without recompilation
(`fastkl.schedules`).

Remedies that use the mean over the batch take `group`, a torch.distributed process group. The batch is then that of all
its processes, and the gradient is the one that DistributedDataParallel averages. None means this process's batch.
"""

from fastkl.remedies._balance import balance, balance_weights
from fastkl.remedies._capacity import capacity
from fastkl.remedies._free_bits import free_bits

__all__ = ["balance", "balance_weights", "capacity", "free_bits"]
