"""Posterior collapse and its remedies: a decoder that can do without the latent, with and without each of them.

    nice -n 19 python bench/collapse.py                       # 3 seeds of every variant; goes on where it was stopped
    nice -n 19 python bench/collapse.py --data mnist5k        # further options are those of `fastkl train`
    python bench/collapse.py --seeds 1 --only "free bits"     # a part: these seeds, variants whose name begins so
    python bench/collapse.py --table                          # what has been measured so far, and the picture of it

Every run is one line of JSON in bench/results/collapse_DATA.jsonl. The figures are those of the test data: how much of
the latent is used (mutual information, KL, active units) and what that costs (ELBO, log p(x)). Grey values are drawn as
zeros and ones for a decoder that reads them, the same for all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastkl.vae import data, train
from fastkl.vae.cli import parser
from fastkl.vae.evaluate import evaluate
from fastkl.vae.parallel import Ranks
from fastkl.vae.progress import Display
from fastkl.vae.rules import resolve
from fastkl.vae.settings import Settings

# Name: options. Where a remedy says how much KL it leaves alone, that is 3 nats in all, of 16 dimensions.
VARIANTS = {
    "weak decoder": "--model mlp",
    "no remedy": "",
    "beta 0.5": "--beta 0.5",
    "warm-up, linear": "--warm-up 2000",
    "warm-up, sigmoid": "--warm-up 2000 --beta-schedule sigmoid",
    "warm-up, 4 cycles": "--warm-up 3000 --beta-schedule cyclical --cycles 4",
    "warm-up, balanced": "--warm-up 2000 --balance 16",
    "free bits per sample": "--free-bits 3 --free-bits-per sample",
    "free bits per dimension": "--free-bits 0.1875 --free-bits-per dimension",
    "free bits per batch": "--free-bits 0.1875 --free-bits-per batch",
    "capacity": "--objective beta_vae --beta 10 --capacity 3 --capacity-steps 2000",
    "InfoVAE": "--objective info_vae --alpha 1",
}
SEEDS = 3
EVALUATION = 0  # the seed of what is drawn for the figures, lest it be taken for a difference between runs
HERE = Path(__file__).parent
COLUMNS = (
    ("mutual information, nats", "mutual_information", "{:.2f}"), ("KL, nats", "kl", "{:.2f}"),
    ("active units", "active_units", "{:.1f}"), ("ELBO, nats", "elbo", "{:.2f}"),
    ("log p(x), nats", "log_prob", "{:.2f}"),
)  # fmt: skip


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about.add_argument("--table", action="store_true", help="measure nothing, print the table and draw the picture")
    about.add_argument("--seeds", type=int, nargs="+", default=range(SEEDS), help="default: 0 to 2")
    about.add_argument("--only", default="", help="variants whose name begins so")
    mine, rest = about.parse_known_args()
    given = parsed(rest)
    source = Path(given.get("data", "digits")).stem
    path = HERE / "results" / f"collapse_{source}.jsonl"
    if not mine.table:
        torch.set_num_threads(1)  # as many runs as there are cores are better served than one
        measure(path, given, mine.seeds, [name for name in VARIANTS if name.startswith(mine.only)])
    rows = read(path)
    print(table(rows))
    if rows:
        draw(rows, source)


def parsed(options: list[str]) -> dict:
    found = parser().parse_args(["train", *options])
    return {item.name: getattr(found, item.name) for item in dataclasses.fields(Settings) if item.name in found}


def settings_of(variant: str, given: dict, seed: int) -> Settings:
    """What a variant says itself comes last."""
    return resolve({"model": "autoregressive", **given, **parsed(VARIANTS[variant].split()), "seed": seed})


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(path: Path, given: dict, seeds: list[int], variants: list[str]) -> None:
    """Seed by seed, so that what is there at any time compares the variants over the same seeds."""
    for variant in variants:
        settings_of(variant, given, 0)  # a wrong option is found before hours are spent
    for seed in seeds:
        for variant in variants:
            # Read anew each time: another process may be at other seeds.
            done = {(row["variant"], row["seed"]): row for row in read(path)}
            about = {"options": VARIANTS[variant], "given": given}
            if row := done.get((variant, seed)):
                if before := {name: row[name] for name in about if row[name] != about[name]}:
                    sys.exit(f"{path}: {variant} was measured with {before}, not {about}: move it away")
                continue
            row = {"variant": variant, "seed": seed, **about, **one(settings_of(variant, given, seed))}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{variant}, seed {seed}: {row['mutual_information']:.2f} nats in {row['active_units']} units, "
                f"ELBO {row['elbo']:.2f}, {row['seconds']:.0f} s",
                flush=True,
            )


def one(settings: Settings) -> dict:
    began = time.perf_counter()
    source = data.load(settings)
    with tempfile.TemporaryDirectory() as folder:
        run = train.start(settings, source, Ranks(), Path(folder))
        if not train.train(run, Display()):
            sys.exit("stopped; what is measured is kept, and the same command goes on")
    seconds = time.perf_counter() - began
    asked = (settings.importance_samples, EVALUATION, run.device, run.prior, source.test_labels)
    figures = evaluate(run.vae, source.test, *asked).figures()
    return {**{name: round(value, 5) for name, value in figures.items()}, "seconds": round(seconds, 1)}


def table(rows: list[dict]) -> str:
    """Mean and standard error over the seeds."""
    lines = [
        "| variant | options | seeds | " + " | ".join(name for name, _, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for variant, options in VARIANTS.items():
        mine = [row for row in rows if row["variant"] == variant]
        if not mine:
            continue
        cells = [variant, f"`{options}`" if options else "", str(len(mine))]
        for _, key, form in COLUMNS:
            values = [row[key] for row in mine]
            text = form.format(statistics.mean(values))
            if len(values) > 1:
                text += " ± " + form.format(statistics.stdev(values) / math.sqrt(len(values)))
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], source: str) -> None:
    """A line of each variant: how much it uses the latent beside what that costs; a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from fastkl.vae.pictures import BLUE, GREY, RED, STYLE

    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        variants = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
        figure = Figure(figsize=(11.5, 1.6 + 0.34 * len(variants)))
        panels = figure.subplots(1, 3, sharey=True)
        units = rows[0]["latent_units"]
        columns = (
            ("Information in the latent", "nats", (("mutual_information", BLUE, "o", "mutual information"),)),
            ("Active units", f"of {units}", (("active_units", BLUE, "o", "active units"),)),
            ("What it costs", "nats, test mean", (("elbo", BLUE, "o", "ELBO"), ("log_prob", RED, "D", "log p(x)"))),
        )
        for panel, (title, unit, series) in zip(panels, columns):
            for key, colour, marker, label in series:
                for place, variant in enumerate(variants):
                    values = [row[key] for row in rows if row["variant"] == variant]
                    style = {"color": colour, "marker": marker, "linewidths": 0, "alpha": 0.65, "s": 34}
                    panel.scatter(values, [place] * len(values), label=None if place else label, **style)
                    mean = statistics.mean(values)
                    panel.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, linewidth=2)
            panel.set(title=title, xlabel=unit)
            if len(series) == 1:
                panel.set_xlim(left=0)
            panel.axhline(1.5, color=GREY, linewidth=1, linestyle="--")
        panels[0].set_yticks(range(len(variants)), variants)
        panels[0].set_ylim(len(variants) - 0.5, -0.5)
        panels[1].set_xlim(0, units)
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        name = "collapse.png" if source == "digits" else f"collapse_{source}.png"
        path = HERE.parent / "docs" / "pictures" / name
        figure.savefig(path, metadata={"Software": None})
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
