"""The forecast of a run's time, and the defaults that depend on the size of data and model."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from typing import TYPE_CHECKING, Any

import torch

from fastkl.vae.data import Data
from fastkl.vae.data.stored import Stored
from fastkl.vae.objective import Noise, Weights, draws_of
from fastkl.vae.plan import TEST_POINTS
from fastkl.vae.settings import CONVOLUTIONAL, FOR_DATA, FOR_PRESET, Settings

if TYPE_CHECKING:
    from fastkl.vae.run import Run

# The default cost of a run, for some minutes on a CPU. Convolutional model: pixels at full size and 16 channels,
# trained on and decoded for log p(x). MLP: data trained on, and values decoded.
TRAINED_PIXELS, DECODED_PIXELS = 2e8, 4e8
TRAINED_DATA, DECODED_VALUES = 1.3e6, 4e9
BATCH, BATCH_PIXELS, LEAST_BATCH = 64, 2**18, 4
EPOCHS, LEAST_STEPS, SAMPLES, LEAST_SAMPLES = 150, 300, 1000, 10
LONG, SHORT = 3600.0, 1200.0  # seconds: a longer run gets a hint, which proposes a run of the second length
WORKERS = 8  # the most processes that read ahead by default
MANY = 2**20  # weights of a layer above which more than one thread pays


def fit_defaults(settings: Settings, given: dict[str, Any], data: Data, processes: int = 1) -> Settings:
    """The settings of a new run with the defaults that depend on the data. Given options, and defaults of a preset or a
    built-in data set, stay."""
    chosen = {**FOR_DATA.get(settings.data, {}), **FOR_PRESET[settings.preset], **given}
    fitted: dict[str, Any] = {}
    conv, values = settings.model in CONVOLUTIONAL and len(data.shape) > 1, math.prod(data.shape)
    pixels = math.prod(data.shape[1:]) * (settings.hidden / 16) ** 2 if conv else values * settings.hidden / 256
    if conv and "layers" not in chosen and any(side % 2**settings.layers for side in data.shape[1:]):
        fitted["layers"] = 1
    if "threads" not in chosen and values * settings.hidden > MANY:
        fitted["threads"] = 0
    batch = settings.batch_size
    if "batch_size" not in chosen:
        batch = BATCH if not conv else max(LEAST_BATCH, min(BATCH, BATCH_PIXELS // math.prod(data.shape[1:])))
        batch = fitted["batch_size"] = max(1, min(batch, len(data.train) // (processes * settings.accumulate)))
    size = dataclasses.replace(settings, batch_size=batch).data_per_step(processes)
    per_epoch = max(1, len(data.train) // size)
    epochs = settings.epochs
    if not {"epochs", "steps"} & chosen.keys():
        budget = TRAINED_PIXELS / (len(data.train) * pixels) if conv else TRAINED_DATA / len(data.train)
        least = min(EPOCHS, math.ceil(LEAST_STEPS / per_epoch))
        epochs = fitted["epochs"] = int(max(1, least, min(EPOCHS, budget)))
    total = settings.steps or epochs * per_epoch
    if "warm_up" not in given and settings.prior != "standard" and 2 * settings.warm_up > total:
        fitted["warm_up"] = total // 4
    if "importance_samples" not in chosen:
        budget = (DECODED_PIXELS if conv else DECODED_VALUES) / (len(data.test) * pixels)
        fitted["importance_samples"] = int(max(LEAST_SAMPLES, min(SAMPLES, budget)))
    if "workers" not in chosen and isinstance(data.train, Stored) and settings.device != "cpu":
        # A GPU would wait for data that the training's own process reads.
        fitted["workers"] = min(WORKERS, (os.cpu_count() or 1) // processes) if torch.cuda.is_available() else 0
    return dataclasses.replace(settings, **fitted)


def seconds_per_step(run: Run) -> float:
    """Seconds of reading, and of an ELBO's forward and backward, measured on the second of two runs, without side
    effects."""
    weights = Weights(*(torch.ones((), dtype=torch.float32, device=run.device) for _ in Weights._fields))
    draws, taken, reading = draws_of(run.settings, run.prior is not None), 0.0, 0.0
    for _ in range(2):
        began = time.perf_counter()
        x = run.data.train[: run.batch_size // (run.ranks.size * run.settings.accumulate)].to(run.device)
        reading = (time.perf_counter() - began) * run.settings.accumulate
        began = time.perf_counter()
        with run.autocast():
            if run.whole is not None:  # only the root of sharded parts can be called
                loss = run.objective(x, Noise(), weights)[0]
            else:
                posterior = run.vae.posterior(x)
                z = posterior.rsample(num_samples=draws)
                loss = posterior.kl().mean() - run.vae.log_likelihood(z, x).mean()
        loss.backward()
        loss.item()  # synchronises with the device
        taken = (time.perf_counter() - began) * run.settings.accumulate
        for parameter in run.objective.parameters():
            parameter.grad = None
    workers = run.settings.workers
    return max(taken, reading / workers) if workers else taken + reading


def forecast(run: Run, step: float, reported: bool = True) -> list[str]:
    """The expected time of a run from the seconds of a step, as lines to print; `reported`: log p(x) is estimated."""
    settings, left = run.settings, run.total_steps - run.step
    # A forward pass is about a third of a step, and decoding is half of a forward pass.
    processes = run.ranks.size if settings.global_batch_size else 1
    datum = step / (settings.data_per_step(processes) / processes) / 3
    watching = TEST_POINTS * min(1000, len(run.data.watched)) * datum
    report = settings.importance_samples * len(run.data.test) * datum / 2 if reported else 0.0
    total = left * step + watching + report
    where = "the GPU" if run.device.type == "cuda" else f"the CPU, {threads(torch.get_num_threads())}"
    after = f", then {duration(report)} for {settings.importance_samples:,} samples per test datum" if reported else ""
    lines = [f"about {duration(total)} on {where}: {left:,} steps of {brief(step)}{after}"]
    if total > LONG:
        steps = max(1, int(SHORT / step))
        ways = [f"--steps {steps:,}".replace(",", "") + f" takes {duration(steps * step)}"] if steps < left else []
        if report > SHORT:
            ways.append(f"--importance-samples {max(1, int(settings.importance_samples * SHORT / report))}")
        smaller = "--hidden" if len(run.data.shape) == 1 else "--hidden or --image-size"
        ways += [f"a smaller {smaller}", *([] if run.device.type == "cuda" else ["a GPU"])]
        lines.append(f"to make it shorter: {', '.join(ways)}")
    return lines


def duration(seconds: float) -> str:
    """A duration with few digits, as the precision of a forecast allows."""
    for name, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name}" if seconds >= 10 * size else f"{seconds / size:.1f} {name}"
    return f"{max(1, round(seconds))} s"


def brief(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"
