"""One training step of a VAE with a large latent at a real size: 256 x 256 images, batch 16, bfloat16 by autocast.

    python -m bench.real_step --out step.csv

The eager loss against fastkl's, as in bench/training_step.py: the whole step with AdamW, and the loss alone. Time is
measured by CUDA events; memory is the peak of the allocated bytes (max_memory_allocated) above those before the step.
The images are random.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import counting
from bench.gpu import MIB, card, release
from bench.store import rounded
from bench.timing import Contender, Pace, measure, ratio, spread
from bench.training_step import LOSS, LOSSES, MODEL, NAME, WHOLE, loss_alone, whole_step
from fastkl.vae.model import VAE, build
from fastkl.vae.rules import resolve
from fastkl.vae.settings import Settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGE, BATCH = 256, 16
MODELS = {NAME: {}, f"{NAME}, hidden 64, layers 3": {"hidden": 64, "layers": 3}}
PARTS = {WHOLE: whole_step, LOSS: loss_alone}
AGREE = 0.01  # relative tolerance: the two losses draw different noise
COLUMNS = ["card", "model", "batch", "part", "loss", "both_ms", "both_ms_low", "both_ms_high", "forward_ms"]
COLUMNS += ["backward_ms", "times_as_fast_as_eager", "peak_mib", "rounds", "note"]


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16)


def made(settings: Settings, shape: tuple[int, ...]) -> VAE:
    torch.manual_seed(0)
    return build(settings, shape, "bernoulli").to(DEVICE)


def under_autocast(step: Contender) -> Contender:
    def forward() -> Tensor:
        with autocast():
            return step.forward()

    return Contender(forward, step.backward)


def rows_of(model: str, image: int, batch: int, pace: Pace) -> tuple[list[dict[str, Any]], bool]:
    """(a row for each part and loss, whether the losses agree)."""
    settings = resolve({**MODEL, "image_size": image, "batch_size": batch, **MODELS[model]})
    x = torch.rand(batch, 3, image, image, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    facts = {"card": card(), "model": model, "batch": " x ".join(map(str, x.shape))}
    values = {}
    for name, loss in LOSSES.items():
        vae = made(settings, tuple(x.shape[1:]))
        with autocast(), torch.no_grad():
            values[name] = loss(vae.encoder(x), vae.decode, x).item()
    if not abs(values["eager"] - values["fastkl"]) <= AGREE * abs(values["eager"]):
        note = f"losses of {values['eager']:.6g} (eager) and {values['fastkl']:.6g} (fastkl): not timed"
        return [{**facts, "note": note}], False
    rows = []
    for part, make in PARTS.items():
        steps = {}
        for name, loss in LOSSES.items():
            vae = made(settings, tuple(x.shape[1:]))
            with autocast():
                steps[name] = under_autocast(make(vae, loss, x))
        times = measure(steps, DEVICE, pace)
        for name, step in steps.items():
            both = spread([1e3 * value for value in times[name].both])
            row = {**facts, "part": part, "loss": name, "both_ms": both.median, "rounds": len(times[name].both)}
            row |= {"both_ms_low": both.low, "both_ms_high": both.high}
            row |= {"forward_ms": 1e3 * spread(times[name].forward).median}
            row |= {"backward_ms": 1e3 * spread(times[name].backward).median}
            row["times_as_fast_as_eager"] = ratio(times["eager"], times[name]).median
            rows.append({**row, "peak_mib": counting.peak_bytes(step.both, DEVICE) / MIB})
        release()
    return rows, True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("step.csv"))
    parser.add_argument("--small", action="store_true", help="small images and one model, to try the script")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no model after this many seconds")
    given = parser.parse_args(arguments)
    began, status = time.monotonic(), 0
    image, batch, pace = (16, 2, Pace(3, 0.001, 0.2)) if given.small else (IMAGE, BATCH, Pace(9, 0.1, 8.0))
    with given.out.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        for model in list(MODELS)[: 1 if given.small else None]:
            if time.monotonic() - began > given.seconds:
                print(f"{model}: no time left")
                break
            rows, agree = rows_of(model, image, batch, pace)
            status |= not agree
            out.writerows({key: rounded(value) for key, value in row.items()} for row in rows)
            file.flush()
            for row in rows:
                result = row.get("note") or (
                    f"{row['part']:<11} {row['loss']:<7} {row['both_ms']:8.2f} ms  {row['peak_mib']:9.1f} MiB  "
                    f"{row['times_as_fast_as_eager']:.2f} times as fast as eager"
                )
                print(f"{row['card']}  {row['model']}  {row['batch']}  {result}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
