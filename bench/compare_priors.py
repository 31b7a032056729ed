"""Priors side by side: the same network, data and split, several seeds; test log p(x) and what the clusters are worth.

    nice -n 19 python bench/compare_priors.py [--data mnist5k --latent 8]    # goes on where it was stopped
    nice -n 19 python bench/compare_priors.py --seeds 3 4                    # beside another process, on another core
    python bench/compare_priors.py --table                                   # what has been measured so far

Every run is one line of JSON in bench/results/priors_DATA.jsonl; further options are those of `fastkl train`.
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

# The learned priors begin after a KL warm-up; what that does by itself is measured too.
PRIORS = {
    "standard": {"prior": "standard"}, "standard, warm-up": {"prior": "standard", "warm_up": 500},
    "gmm": {"prior": "gmm"}, "gmm, relaxed": {"prior": "gmm", "kl": "relaxed"},
    "vamp": {"prior": "vamp"}, "flow": {"prior": "flow"},
}  # fmt: skip
SEEDS = 5
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    ("log p(x), nats", "log_prob", "{:.2f}"), ("ELBO, nats", "elbo", "{:.2f}"), ("KL, nats", "kl", "{:.2f}"),
    ("active units", "active_units", "{:.1f}"), ("used components", "used_components", "{:.1f}"),
    ("clustering accuracy", "clustering_accuracy", "{:.3f}"), ("cluster purity", "cluster_purity", "{:.3f}"),
    ("mutual information", "normalised_mutual_information", "{:.3f}"),
)  # fmt: skip


def main() -> None:
    about = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about.add_argument("--table", action="store_true", help="measure nothing, print the table")
    about.add_argument("--seeds", type=int, nargs="+", default=range(SEEDS), help="default: 0 to 4")
    mine, rest = about.parse_known_args()
    options = parser().parse_args(["train", *rest])
    # How to train at all may be the same for all priors; what only some of them know is left to their defaults.
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(Settings) if item.name in options}
    path = RESULTS / f"priors_{Path(given.get('data', 'digits')).stem}.jsonl"
    if not mine.table:
        torch.set_num_threads(1)  # as many runs as there are cores are better served than one
        measure(path, given, mine.seeds)
    print(table(read(path)))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(path: Path, given: dict, seeds: list[int]) -> None:
    """Seed by seed, so that what is there at any time compares the priors over the same seeds."""
    for seed in seeds:
        for prior in PRIORS:
            # Read anew each time: another process may be at other seeds.
            done = {(row["prior"], row["seed"]): row["given"] for row in read(path)}
            if (prior, seed) not in done:
                row = {"prior": prior, "seed": seed, "given": given, **one(prior, seed, given)}
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{prior} {seed}: log p(x) {row['log_prob']:.2f}, {row['seconds']:.0f} s", flush=True)
            elif done[prior, seed] != given:
                sys.exit(f"{path} was measured with {done[prior, seed]}, not {given}: move it away")


def one(prior: str, seed: int, given: dict) -> dict:
    settings = resolve({**given, **PRIORS[prior], "seed": seed})
    began = time.perf_counter()
    source = data.load(settings)
    with tempfile.TemporaryDirectory() as folder:
        run = train.start(settings, source, Ranks(), Path(folder))
        if not train.train(run, Display()):
            sys.exit("stopped; what is measured is kept, and the same command goes on")
    seconds = time.perf_counter() - began
    asked = (settings.importance_samples, seed, run.device, run.prior, source.test_labels)
    figures = evaluate(run.vae, source.test, *asked).figures()
    figures = {name: round(value, 5) for name, value in figures.items()}
    return {**figures, "steps": run.step, "seconds": round(seconds, 1)}


def table(rows: list[dict]) -> str:
    """Mean and standard error over the seeds."""
    lines = [
        "| prior | seeds | " + " | ".join(name for name, _, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for prior in PRIORS:
        mine = [row for row in rows if row["prior"] == prior]
        if not mine:
            continue
        cells = [prior, str(len(mine))]
        for _, key, form in COLUMNS:
            values = [row[key] for row in mine if key in row]
            text = form.format(statistics.mean(values)) if values else ""
            if len(values) > 1:
                text += " ± " + form.format(statistics.stdev(values) / math.sqrt(len(values)))
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
