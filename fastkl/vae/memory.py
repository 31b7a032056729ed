"""The memory and time of sample and KL with fastkl, beside the eager formula."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkl

MIB = 2**20


def eager(head: Tensor) -> tuple[Tensor, Tensor]:
    """Sample and KL as in most training loops."""
    mu, logvar = head.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(std)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).flatten(1).sum(1)
    return z, kl


def fused(head: Tensor) -> tuple[Tensor, Tensor]:
    return fastkl.DiagonalNormal.from_packed(head, dim=1).rsample_kl()


def compare(latent_shape: tuple[int, ...], batch: int = 32) -> dict[str, Any]:
    """Both losses on one packed head [batch, 2 * latent, ...] in float32, on the CPU."""
    shape = (batch, 2 * latent_shape[0], *latent_shape[1:])
    head = torch.randn(shape, dtype=torch.float32, device="cpu", requires_grad=True)
    sizes = " x ".join(map(str, latent_shape))
    what = (
        f"Sample and KL of {batch} latents of {sizes}, float32, on the CPU; one latent tensor is "
        f"{batch * math.prod(latent_shape) * 4 / MIB:.1f} MiB. Kept: tensors saved between forward and backward, "
        "without the head itself. Peak: memory allocated at once beyond the head, with sample, gradients and the "
        "temporaries of each op."
    )
    return {"what": what, "rows": {"eager": measure(eager, head), "fastkl": measure(fused, head)}}


def measure(loss: Callable[[Tensor], tuple[Tensor, Tensor]], head: Tensor) -> dict[str, float]:
    step(loss, head)  # not timed: a first call has set-up costs
    times = []
    for _ in range(5):
        began = time.perf_counter()
        step(loss, head)
        times.append(time.perf_counter() - began)
    return {"saved": saved_bytes(loss, head) / MIB, "peak": peak_bytes(loss, head) / MIB, "time": 1e3 * min(times)}


def step(loss: Callable[[Tensor], tuple[Tensor, Tensor]], head: Tensor) -> None:
    head.grad = None
    z, kl = loss(head)
    # The sum stands for a decoder without costs: its gradient reaches z, and it does not save z.
    (z.sum() + kl.sum()).backward()


def saved_bytes(loss: Callable[[Tensor], tuple[Tensor, Tensor]], head: Tensor) -> int:
    """Bytes of the storages that autograd saves, each counted once, without the head, which is the encoder's."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != head.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = loss(head)
    del outputs
    return sum(kept.values())


def peak_bytes(loss: Callable[[Tensor], tuple[Tensor, Tensor]], head: Tensor) -> int:
    """Peak of the allocated bytes by the profiler's record of every allocation, also inside ops."""
    head.grad = None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # mutes the profiler's messages in the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(loss, head)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak
