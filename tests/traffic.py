"""Bytes that a process gives to collectives, shared by tests of several processes."""

from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {"allgather_": "gathered", "allreduce_": "summed", "all_reduce": "summed", "send": "sent"}  # others by name


class Traffic(TorchDispatchMode):
    """Counts them by kind. Around a ring of R processes, one sends R - 1 times what it gives to an all-gather, and 2 (R
    - 1) / R times what it gives to an all-reduce."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(
            ("wait_", "_wrap_", "recv", "barrier")
        ):
            given = args[1] if name == "allgather_" else args[0]
            (tensor,) = given if isinstance(given, list) else [given]
            kind = KINDS.get(name, name)
            self.bytes[kind] = self.bytes.get(kind, 0) + tensor.nbytes
        return func(*args, **(kwargs or {}))
