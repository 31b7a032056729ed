"""torchrun: which process this is, and the few words that processes exchange. Alone, every function here is trivial."""

from __future__ import annotations

import gc
import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fastkl.vae.errors import UserError


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1
    local: int = 0  # which process of this machine

    @property
    def main(self) -> bool:
        """Whether this process writes the files and the terminal; no other does."""
        return self.rank == 0

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The processes whose batches together are the batch."""
        return distributed.group.WORLD if self.size > 1 else None

    def mean(self, values: Tensor) -> Tensor:
        """The average over processes, the same bits on each."""
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def broadcast(self, value: Any) -> Any:
        """What the main process knows, on every process."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wrap(self, module: nn.Module, partly: bool = False) -> nn.Module:
        """`partly`: some steps do not use all parameters."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=partly)

    def share(self, indices: Tensor) -> Tensor:
        """This process's contiguous part of a batch."""
        return indices.chunk(self.size)[self.rank]


def start() -> Ranks:
    """Join the processes that torchrun started; without torchrun, be the only one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return Ranks()
    if not distributed.is_available():
        raise UserError("this build of torch has no torch.distributed; run without torchrun")
    # Imported after the group exists, as DistributedDataParallel does, its functions' default arguments keep the group
    # and gloo's threads for ever: one that lets go of a tensor while the interpreter ends aborts the process.
    importlib.import_module("torch.distributed.nn")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if torch.cuda.is_available():
        if local < torch.cuda.device_count():  # else choose_device refuses, or the run is on the CPU
            torch.cuda.set_device(local)  # before the group: NCCL, and whatever says "cuda", takes the current device
        backend = "cpu:gloo,cuda:nccl"  # by where a tensor is: --device cpu, and what is sent as an object
    distributed.init_process_group(backend)
    return Ranks(distributed.get_rank(), distributed.get_world_size(), local)


def stop(ranks: Ranks) -> None:
    """Leave the others; threads that exchanged tensors end here, not while the interpreter does."""
    if ranks.size > 1 and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # what wrapped the model holds the group, too
