"""One training step of a VAE with a latent of 16 x 64 x 64, with the eager loss and with fastkl's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkl
from bench import counting
from bench.measure import named
from bench.timing import Contender, Pace, heap_of, measure, ratio, spread, threads
from fastkl.vae import memory
from fastkl.vae.data import load
from fastkl.vae.model import VAE, build
from fastkl.vae.rules import resolve

PACE = Pace(9, 0.1, 8.0)
NAME = "large-latent"
MODEL = {"model": "conv", "image_size": 128, "latent": 16, "hidden": 16, "layers": 1, "batch_size": 4}
WHOLE, LOSS = "whole step", "loss alone"


def eager_loss(head: Tensor, decode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    z, kl = memory.eager(head)
    bits = F.binary_cross_entropy_with_logits(decode(z), x, reduction="none")
    return (bits.flatten(1).sum(1) + kl).mean()


def fastkl_loss(head: Tensor, decode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    q = fastkl.DiagonalNormal.from_packed(head, dim=1)
    likelihood = lambda z: fastkl.bernoulli_log_prob(x, decode(z), event_ndim=x.dim() - 1)  # noqa: E731
    return fastkl.objectives.elbo(q, None, likelihood).loss


LOSSES = {"eager": eager_loss, "fastkl": fastkl_loss}


def whole_step(vae: VAE, loss: Callable, x: Tensor) -> Contender:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)

    def backward(value: Tensor) -> None:
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender(lambda: loss(vae.encoder(x), vae.decode, x), backward)


def loss_alone(vae: VAE, loss: Callable, x: Tensor) -> Contender:
    """A step without the cost of encoder and decoder: head and logits are given, and the sum of z is added to the
    logits."""
    with torch.no_grad():
        head = vae.encoder(x)
        logits = vae.decode(head.chunk(2, 1)[0])
    leaves = [head.requires_grad_(), logits.requires_grad_()]
    shape = (len(x), *[1] * (x.dim() - 1))
    decode = lambda z: logits + z.flatten(1).sum(1).view(shape)  # noqa: E731
    return Contender(lambda: loss(head, decode, x), lambda value: torch.autograd.grad(value, leaves))


def rows_of(device: str, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row for each loss and part, a line for each pair of losses that do not agree)."""
    settings = resolve(MODEL)
    data = load(settings)
    x = data.train[: settings.batch_size].to(device)
    rows, wrong = [], []
    with threads(count):
        losses = {}
        for part, make in ((WHOLE, whole_step), (LOSS, loss_alone)):
            steps = {}
            for name, loss in LOSSES.items():
                torch.manual_seed(0)
                vae = build(settings, data.shape, data.likelihood).to(device)
                steps[name] = make(vae, loss, x)
                losses[name] = loss(vae.encoder(x), vae.decode, x).item()
            # The two losses draw different noise, hence the tolerance.
            if abs(losses["eager"] - losses["fastkl"]) > 0.01 * abs(losses["eager"]):
                wrong.append(f"{NAME}: losses of {losses['eager']:.2f} (eager) and {losses['fastkl']:.2f} (fastkl)")
                continue
            with heap_of(steps["eager"], device):
                times = measure(steps, device, PACE)
            for name, step in steps.items():
                row = {"op": NAME, "case": part, "threads": count, "provider": name}
                row |= named("both_ms", spread([1e3 * value for value in times[name].both]))
                row |= named("speed_up", ratio(times["eager"], times[name]))
                row["peak_bytes"] = counting.peak_bytes(step.both, device)
                rows.append({**row, "rounds": len(times[name].both), "batch": " x ".join(map(str, x.shape))})
    return rows, wrong
