"""What the tests of tests/launches share: they run where Triton has the driver of fake_driver."""

from __future__ import annotations

import torch

from fastkl.kernels import _launch, kl_normal

from fake_driver import LAUNCHES

# A launcher and its settings.
forward = kl_normal.fwd
SETTINGS = (-1, [], 1, "logvar", float("-inf"), float("inf"), False)


def labelled(launches, tensors):
    """The launches with addresses as (tensor, offset in its memory), or as the how manieth new one."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    known, seen = [(storage.data_ptr(), storage.nbytes(), at) for at, storage in enumerate(storages)], {}

    def label(value):
        if not isinstance(value, int) or value < 1 << 32:
            return value
        for start, size, at in known:
            if start <= value < start + size:
                return at, value - start
        return "new", seen.setdefault(value, len(seen)), value % 16

    return [launch._replace(parameters=[label(value) for value in launch.parameters]) for launch in launches]


def pair(n=6, d=16, dtype=torch.float32, offset=0):
    """Two tensors whose first address lies `offset` bytes behind a multiple of 16."""
    memory = torch.zeros(2, n * d + 16, dtype=dtype)
    first = offset // memory.itemsize
    return [row[first : first + n * d].view(n, d) for row in memory]


def launched(function, tensors):
    LAUNCHES.clear()
    result = function(tensors, *SETTINGS)
    return labelled(LAUNCHES, [*tensors, result])


def ready():
    """forward has a plan for pair()."""
    for _ in range(3):
        forward(pair(), *SETTINGS)
    LAUNCHES.clear()


def replayed_and(after):
    """A launcher that does `after` to what forward makes."""
    return _launch.replayed(lambda tensors: after(tensors, forward.__wrapped__(tensors, *SETTINGS)))
