"""Write the tables of times on a CPU in README.md and docs/, and the pictures, from a whole run of `make bench`.

    python -m bench.pages bench/results/DIR

A table is the text between `<!-- bench: NAME -->` and the next `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.measure import COMPILE
from bench.store import HERE, Store
from bench.tables import DISTRIBUTIONS, TITLES, find, sizes_measured, thread_counts

ROOT = HERE.parent
PAGES = ("README.md", "docs/cpu.md", "docs/performance.md")
PICTURES = ("bench_sizes", "bench_ops", "bench_sweeps", "bench_costs")
SHORT = ("32 x 8", "512 x 64", "512 x 512", "4096 x 8192")
# Op -> the contender beside torch.compile.
PAIRS = {
    "gmm_log_prob": DISTRIBUTIONS,
    "mmd": "eager",
    "total_correlation": "eager",
    "sinkhorn_divergence": "geomloss",
}
NAMES = {DISTRIBUTIONS: "`MixtureSameFamily`", "eager": "the eager formula"}
VARIANT = ", expansion"  # a case with another formula for torch.compile


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], ""])


def times(value: float) -> str:
    """Two significant digits."""
    return f"{value:.1f}" if value < 9.95 else f"{float(f'{value:.2g}'):.0f}"


def device(about: dict[str, Any]) -> str:
    return re.sub(r"\((R|TM)\)| Processor| CPU", "", about["cpu"]).strip()


def sizes(store: Store, corner: str, names: list[str], counts: list[int]) -> str:
    """Speed-ups of fastkl and torch.compile over eager."""
    rows = []
    for op, title in TITLES.items():
        for count in reversed(counts):
            label = f"{title}, {count} thread{'s' * (count != 1)}" if len(counts) > 1 else title
            found = [find(store, op, name, count) for name in names]
            cells = [f"{times(r['fastkl']['speed_up'])} / {times(r[COMPILE]['speed_up'])}" for r in found]
            rows.append([f"{label}: fastkl / torch.compile", *cells])
    return markdown([corner, *names], rows)


def first(store: Store, cpu: str) -> str:
    return sizes(store, cpu, list(SHORT), [min(thread_counts(store))])


def every_size(store: Store, cpu: str) -> str:
    return sizes(store, f"{cpu}: time of eager over that of", sizes_measured(store, "kl_normal"), thread_counts(store))


def pairs(store: Store, cpu: str) -> str:
    """Of two formulas under torch.compile the faster one counts."""
    rows, counts = [], thread_counts(store)

    def over(op: str, provider: str, *cases: str) -> str:
        """A contender's time over that of fastkl, for each number of threads."""
        cells = []
        for count in counts:
            found = [find(store, op, case, count) for case in cases]
            timed = [r for r in found if isinstance(r.get(provider, {}).get("both_ms"), float)]
            ratios = [r[provider]["both_ms"] / r["fastkl"]["both_ms"] for r in timed]
            cells.append(times(min(ratios)) if ratios else "not timed")
        return " / ".join(cells)

    for op, provider in PAIRS.items():
        cases = dict.fromkeys(row["case"] for row in store.rows("ops") if row["op"] == op)
        for case in (case for case in cases if not case.endswith(VARIANT)):
            compiled = over(op, COMPILE, case, case + VARIANT)
            rows.append([f"`{op}`, {case}", NAMES.get(provider, provider), over(op, provider, case), compiled])
    each = f"{' / '.join(map(str, counts))} threads"
    return markdown([cpu, "against", f"times as fast, {each}", f"as torch.compile, {each}"], rows)


TABLES = {"first": first, "sizes": every_size, "pairs": pairs}


def filled(text: str, store: Store, about: dict[str, Any]) -> str:
    """A page with its tables written anew."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{TABLES[found[2]](store, device(about))}\n<!-- end -->"

    return re.sub(r"(<!-- bench: (\w+) -->\n).*?<!-- end -->", table, text, flags=re.DOTALL)


def main(folder: Path) -> None:
    store, about = Store(folder, keep=True), json.loads((folder / "machine.json").read_text())
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8"), store, about), encoding="utf-8")
    for name in PICTURES:
        shutil.copyfile(folder / f"{name}.png", ROOT / f"docs/pictures/{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
