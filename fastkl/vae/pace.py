"""How long a run will take, before it begins, and the defaults that follow the size of data and model."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import torch

from fastkl.vae.data import Data
from fastkl.vae.objective import draws_of
from fastkl.vae.plan import TEST_POINTS
from fastkl.vae.settings import FOR_DATA, FOR_PRESET, Settings

if TYPE_CHECKING:
    from fastkl.vae.run import Run

# What a run costs by default, so that it takes some minutes on a CPU. Of a convolutional model in pixels of 16 channels
# at full size: those trained on, and those decoded for log p(x). Of an MLP in data, and in values decoded.
TRAINED_PIXELS, DECODED_PIXELS = 2e8, 4e8
TRAINED_DATA, DECODED_VALUES = 1.3e6, 4e9
BATCH, BATCH_PIXELS, LEAST_BATCH = 64, 2**18, 4
EPOCHS, LEAST_STEPS, SAMPLES, LEAST_SAMPLES = 150, 300, 1000, 10
LONG, SHORT = 3600.0, 1200.0  # seconds: of a run that asks for a remark, and of the one that it proposes
MANY = 2**20  # weights of a layer from which on one thread is not enough


def suit(settings: Settings, given: dict[str, Any], data: Data, processes: int = 1) -> Settings:
    """The settings of a new run with the defaults that wait for the data; what was typed, or belongs to a preset or a
    built-in data set, stays."""
    chosen = {**FOR_DATA.get(settings.data, {}), **FOR_PRESET[settings.preset], **given}
    found: dict[str, Any] = {}
    conv, values = settings.model == "conv" and len(data.shape) == 3, math.prod(data.shape)
    pixels = data.shape[1] * data.shape[2] * (settings.hidden / 16) ** 2 if conv else values * settings.hidden / 256
    if conv and "layers" not in chosen and any(side % 2**settings.layers for side in data.shape[1:]):
        found["layers"] = 1
    if "threads" not in chosen and values * settings.hidden > MANY:
        found["threads"] = 0
    batch = settings.batch_size
    if "batch_size" not in chosen:
        batch = BATCH if not conv else max(LEAST_BATCH, min(BATCH, BATCH_PIXELS // math.prod(data.shape[1:])))
        batch = found["batch_size"] = max(1, min(batch, len(data.train) // processes))
    per_epoch = max(1, len(data.train) // (batch * processes))
    epochs = settings.epochs
    if not {"epochs", "steps"} & chosen.keys():
        budget = TRAINED_PIXELS / (len(data.train) * pixels) if conv else TRAINED_DATA / len(data.train)
        least = min(EPOCHS, math.ceil(LEAST_STEPS / per_epoch))
        epochs = found["epochs"] = int(max(1, least, min(EPOCHS, budget)))
    total = settings.steps or epochs * per_epoch
    if "warm_up" not in given and settings.prior != "standard" and 2 * settings.warm_up > total:
        found["warm_up"] = total // 4
    if "importance_samples" not in chosen:
        budget = (DECODED_PIXELS if conv else DECODED_VALUES) / (len(data.test) * pixels)
        found["importance_samples"] = int(max(LEAST_SAMPLES, min(SAMPLES, budget)))
    return dataclasses.replace(settings, **found)


def seconds_per_step(run: Run) -> float:
    """Of an ELBO there and back, by doing it once after a first time. Nothing of it is left but the time."""
    x = run.data.train[: run.settings.batch_size].to(run.device)
    draws, taken = draws_of(run.settings, run.prior is not None), 0.0
    for _ in range(2):
        began = time.perf_counter()
        posterior = run.vae.posterior(x)
        z = posterior.rsample(num_samples=draws)
        loss = posterior.kl().mean() - run.vae.log_likelihood(z, x).mean()
        loss.backward()
        loss.item()  # waits for the device
        taken = time.perf_counter() - began
        for parameter in run.vae.parameters():
            parameter.grad = None
    return taken


def forecast(run: Run, step: float, reported: bool = True) -> list[str]:
    """What is said of the time before a run begins, from the seconds of a step; `reported`: log p(x) is estimated."""
    settings, left = run.settings, run.total_steps - run.step
    # A forward pass is a third of a step, and decoding half of it.
    datum = step / settings.batch_size / 3
    watching = TEST_POINTS * min(1000, len(run.data.watched)) * datum
    report = settings.importance_samples * len(run.data.test) * datum / 2 if reported else 0.0
    total = left * step + watching + report
    where = "the GPU" if run.device.type == "cuda" else f"the CPU, {threads(torch.get_num_threads())}"
    after = f", then {spoken(report)} for {settings.importance_samples:,} samples per test datum" if reported else ""
    lines = [f"about {spoken(total)} on {where}: {left:,} steps of {brief(step)}{after}"]
    if total > LONG:
        steps = max(1, int(SHORT / step))
        ways = [f"--steps {steps:,}".replace(",", "") + f" takes {spoken(steps * step)}"] if steps < left else []
        if report > SHORT:
            ways.append(f"--importance-samples {max(1, int(settings.importance_samples * SHORT / report))}")
        smaller = "--hidden" if len(run.data.shape) == 1 else "--hidden or --image-size"
        ways += [f"a smaller {smaller}", *([] if run.device.type == "cuda" else ["a GPU"])]
        lines.append(f"to make it shorter: {', '.join(ways)}")
    return lines


def spoken(seconds: float) -> str:
    """With the precision that a forecast has."""
    for name, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name}" if seconds >= 10 * size else f"{seconds / size:.1f} {name}"
    return f"{max(1, round(seconds))} s"


def brief(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"
