"""Studies of variants of a training run over several seeds, for compare_*.py and collapse.py.

    nice -n 19 python bench/collapse.py                       # continues after an interrupt
    nice -n 19 python bench/collapse.py --seeds 1 2           # beside another process, on another core
    nice -n 19 python bench/collapse.py --data mnist5k        # further options are those of `fastkl train`
    python bench/collapse.py --only "free bits"               # variants whose name begins with this
    python bench/collapse.py --table                          # only print the table of stored results

Every run is one line of JSON in bench/results/NAME_DATA.jsonl; the figures are those of the test data.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastkl.vae import data, loop
from fastkl.vae.cli import parser
from fastkl.vae.evaluate import evaluate
from fastkl.vae.parallel import Ranks
from fastkl.vae.progress import Display
from fastkl.vae.rules import resolve
from fastkl.vae.run import start
from fastkl.vae.settings import Settings

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Study:
    """A study.

    variants: name -> options of `fastkl train`, which take precedence over those of the whole study. columns of the
    table: (heading, figure, format). evaluation: the seed of the evaluation; None takes the run's.
    """

    name: str
    variants: dict[str, str]
    columns: tuple[tuple[str, str, str], ...]
    seeds: int = 3
    common: str = ""
    evaluation: int | None = None
    draw: Callable[[list[dict], str], None] | None = None

    def main(self, about: str) -> None:
        options = argparse.ArgumentParser(description=about.splitlines()[0])
        options.add_argument("--table", action="store_true", help="only print the table")
        options.add_argument(
            "--seeds", type=int, nargs="+", default=range(self.seeds), help="seeds to run; default: all"
        )
        options.add_argument("--only", default="", help="run the variants whose name begins with this")
        mine, rest = options.parse_known_args()
        given = parsed([*self.common.split(), *rest])
        source = Path(given.get("data", "digits")).stem
        path = HERE / "results" / f"{self.name}_{source}.jsonl"
        if not mine.table:
            torch.set_num_threads(1)  # several runs in parallel use the cores better than several threads
            self.measure(path, given, mine.seeds, [name for name in self.variants if name.startswith(mine.only)])
        rows = read(path)
        print(self.table(rows))
        if rows and self.draw is not None:
            self.draw(rows, source)

    def settings_of(self, variant: str, given: dict, seed: int) -> Settings:
        return resolve({**given, **parsed(self.variants[variant].split()), "seed": seed})

    def measure(self, path: Path, given: dict, seeds: list[int], variants: list[str]) -> None:
        """Run all variants seed by seed, so that partial results compare the variants over the same seeds."""
        for variant in variants:
            self.settings_of(variant, given, 0)  # raises for a wrong option before hours are spent
        for seed in seeds:
            for variant in variants:
                # Read again each time, because another process may add rows of other seeds.
                done = {(row["variant"], row["seed"]): row for row in read(path)}
                about = {"options": self.variants[variant], "given": given}
                if row := done.get((variant, seed)):
                    if before := {name: row[name] for name in about if row[name] != about[name]}:
                        sys.exit(f"{path}: {variant} was measured with {before}, not {about}: move it away")
                    continue
                figures = self.one(self.settings_of(variant, given, seed))
                row = {"variant": variant, "seed": seed, **about, **figures}
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                shown = ", ".join(f"{name} {form.format(row[key])}" for name, key, form in self.columns if key in row)
                print(f"{variant}, seed {seed}: {shown}, {row['seconds']:.0f} s", flush=True)

    def one(self, settings: Settings) -> dict:
        began = time.perf_counter()
        source = data.load(settings)
        with tempfile.TemporaryDirectory() as folder:
            run = start(settings, source, Ranks(), Path(folder))
            if not loop.train(run, Display()):
                sys.exit("stopped; results are kept, and the same command continues")
        seconds = time.perf_counter() - began
        seed = settings.seed if self.evaluation is None else self.evaluation
        asked = (settings.importance_samples, seed, run.device, run.prior, source.test_labels)
        figures = evaluate(run.vae, source.test, *asked).figures()
        figures = {name: round(value, 5) for name, value in figures.items()}
        return {**figures, "steps": run.step, "seconds": round(seconds, 1)}

    def table(self, rows: list[dict]) -> str:
        """A Markdown table of means and standard errors over the seeds."""
        heads = ["variant", "options", "seeds", *(name for name, _, _ in self.columns)]
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for variant, options in self.variants.items():
            mine = [row for row in rows if row["variant"] == variant]
            if not mine:
                continue
            cells = [variant, f"`{options}`" if options else "", str(len(mine))]
            for _, key, form in self.columns:
                values = [row[key] for row in mine if key in row]
                text = form.format(statistics.mean(values)) if values else ""
                if len(values) > 1:
                    text += " ± " + form.format(statistics.stdev(values) / math.sqrt(len(values)))
                cells.append(text)
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def parsed(options: list[str]) -> dict:
    found = parser().parse_args(["train", *options])
    return {item.name: getattr(found, item.name) for item in dataclasses.fields(Settings) if item.name in found}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
