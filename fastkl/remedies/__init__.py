"""What keeps the KL term from closing the latents down: free bits, a capacity, balancing of groups.

    loss = (beta * remedies.free_bits(q, 0.25, per="batch") - log_likelihood).mean()

Each stands where the KL stood in the loss. Numbers in nats may be tensors, which change from step to step without a
recompilation (`fastkl.schedules`).

Over several processes: free bits, a capacity and balancing that look at the mean over the batch take `group`, a
torch.distributed process group, and then mean the batch of all its processes, with its gradient (as
DistributedDataParallel averages it). None means this process's batch alone.
"""

from fastkl.remedies._balance import balance, balance_weights
from fastkl.remedies._capacity import capacity
from fastkl.remedies._free_bits import free_bits

__all__ = ["balance", "balance_weights", "capacity", "free_bits"]
