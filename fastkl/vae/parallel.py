"""Several processes: ranks, their group, and the exchange of values. With one process nothing is exchanged."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from fastkl.vae.autoencoder import Decoder, Encoder
from fastkl.vae.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and the place of this one among them."""

    rank: int = 0
    size: int = 1
    local: int = 0  # index among the processes of this machine
    guest: bool = False  # in a group of the caller, such as Ray Train's

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The process group over which a batch is split, or None for one process."""
        return distributed.group.WORLD if self.size > 1 else None

    def mean(self, values: Tensor) -> Tensor:
        """The average over processes, bitwise the same on each."""
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def wrap(self, module: nn.Module, partly: bool = False) -> nn.Module:
        """The module in DistributedDataParallel, or as it is for one process. `partly`: some steps do not use all
        parameters."""
        if self.size == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=partly)

    def shard(
        self, root: nn.Module, networks: list[nn.Module], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Leave each process its part of the parameters, on `device`. The layers of the networks are gathered one at a
        time, in `dtype`; the rest (prior, likelihood, discriminator) together and in float32."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        policies = [MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32) for kind in (dtype, None)]
        # It warns of outputs that are views, of which only operations in place would be wrong.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        try:
            for network in networks:
                for layer in layers_of(network):
                    if any(True for _ in layer.parameters()):
                        fully_shard(layer, mesh=mesh, mp_policy=policies[0])
            fully_shard(root, mesh=mesh, mp_policy=policies[1])
        except ValueError as error:
            raise UserError(f"--parallel fsdp: {error}") from None

    @contextlib.contextmanager
    def unsharded(self, root: nn.Module) -> Iterator[None]:
        """A context in which the parameters outside the networks' layers are whole on each process."""
        if not sharded(root):
            yield
            return
        root.unshard()
        try:
            yield
        finally:
            root.reshard()

    def without_exchange(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """A context in which a backward pass only adds to this process's gradients."""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.no_sync()
        return keep_gradients(module) if sharded(module) else contextlib.nullcontext()

    def rows(self, count: int) -> slice:
        """This process's contiguous part of `count` rows, of which the first processes may have one more."""
        part = torch.arange(count, device="cpu").tensor_split(self.size)[self.rank]
        return slice(int(part[0]), int(part[-1]) + 1)

    def share(self, whole: Tensor, parts: int = 1) -> Tensor:
        """This process's rows of each of the `parts` that a batch is split into first."""
        return torch.cat([part[self.rows(len(part))] for part in whole.tensor_split(parts)])


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The parts of a network that are gathered one at a time: those of a Sequential, the blocks of diffusers'
    autoencoder and what they leave, or the whole network. Each is called as a module, by which it is gathered."""
    if isinstance(network, nn.Sequential):
        return list(network)
    return [*(network.blocks() if isinstance(network, (Encoder, Decoder)) else ()), network]


def sharded(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether `fully_shard` was applied to the module."""
    return hasattr(module, "set_requires_gradient_sync")


@contextlib.contextmanager
def keep_gradients(module: FSDPModule) -> Iterator[None]:
    """A context in which a sharded module adds gradients without reducing them."""
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The module's whole state on the CPU of the main process, a collective call; elsewhere it is empty."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_whole(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state, the same on each process, into a module that may be sharded."""
    if not any(hasattr(parameter, "to_local") for parameter in module.parameters()):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))


def start() -> Ranks:
    """The processes of this run: those of an existing group or, under torchrun, of a new one; else this one alone."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if distributed.is_available() and distributed.is_initialized():
        return Ranks(distributed.get_rank(), distributed.get_world_size(), local, guest=True)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return Ranks()
    if not distributed.is_available():
        raise UserError("this build of torch has no torch.distributed; run without torchrun")
    # Imported before the group exists. Otherwise DistributedDataParallel imports it later, and its functions' default
    # arguments keep the group and gloo's threads alive. A thread that frees a tensor while the interpreter ends aborts
    # the process.
    importlib.import_module("torch.distributed.nn")
    backend = "gloo"
    if torch.cuda.is_available():
        if local < torch.cuda.device_count():  # else choose_device raises, or the run is on the CPU
            torch.cuda.set_device(local)  # before the group: NCCL and "cuda" without an index use the current device
        backend = "cpu:gloo,cuda:nccl"  # gloo for --device cpu and for objects
    distributed.init_process_group(backend)
    return Ranks(distributed.get_rank(), distributed.get_world_size(), local)


def restarted() -> bool:
    """Whether this is a repetition of torchrun's command, after the death of a process."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart() -> bool:
    """Whether torchrun repeats its command if a process dies.

    Raises:
        UserError: repeated commands would not find each other.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        return False
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        # Its store keeps the addresses of the dead processes (https://github.com/pytorch/pytorch/issues/135712).
        raise UserError(
            "after a restart by torchrun --max-restarts the processes would connect to dead ones: "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun"
        )
    return True


def stop(ranks: Ranks) -> None:
    """Leave the group, so that its threads end before the interpreter does. The caller's group stays."""
    if ranks.size > 1 and not ranks.guest and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # DistributedDataParallel also holds the group
