"""The tables of the results, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.bench_kl_normal import SIZES
from bench.measure import COMPILE, COPY, LIMIT
from bench.store import Store, cache_bytes
from bench.sweeps import SWEEPS, growth_of

DISTRIBUTIONS = "torch.distributions"
TITLES = {"kl_normal": "KL", "rsample_kl": "sample + KL"}


class Table(NamedTuple):
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    words: int = 2  # number of leading text columns
    page_only: tuple[str, ...] = ()  # columns too many for a terminal

    def rich(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable

        left = {"title_justify": "left", "caption_justify": "left"}
        table = RichTable(title=self.title, caption=self.note, box=box.SIMPLE_HEAD, pad_edge=False, **left)
        table.collapse_padding = True
        shown = [index for index, name in enumerate(self.header) if name not in self.page_only]
        for index in shown:
            side = "left" if index < self.words else "right"
            width = {"no_wrap": True} if index != 1 else {"overflow": "fold", "min_width": 16}
            table.add_column(self.header[index], justify=side, **width)
        for row in self.rows:
            table.add_row(*(row[index] for index in shown))
        return table


def all_tables(store: Store) -> list[Table]:
    tables = [sizes(store), *of_ops(store), of_sweeps(store), of_training(store)]
    return [table for table in tables if table.rows]


def number(value: Any, digits: int = 3) -> str:
    """A number with three significant digits, without exponent unless it is tiny."""
    if not isinstance(value, int | float):
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return text


def times(value: Any) -> str:
    return f"{number(value)}x" if isinstance(value, int | float) else "-"


def size(value: Any) -> str:
    """A number of bytes in a unit with one to four digits before the point."""
    if not isinstance(value, int | float):
        return "-"
    power = next((p for p in range(4) if value < 1000 * 1024**p), 3)
    return f"{number(value / 1024**power)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def pair(row: dict[str, Any], name: str) -> str:
    there, back = row.get(f"{name}_forward"), row.get(f"{name}_backward")
    return f"{there}+{back}" if isinstance(there, int) and isinstance(back, int) else "-"


def find(store: Store, op: str, case: str, threads: Any) -> dict[str, dict[str, Any]]:
    """Contender -> row."""
    rows = store.rows("ops")
    return {r["provider"]: r for r in rows if (r["op"], r["case"], r["threads"]) == (op, case, threads)}


def thread_counts(store: Store) -> list[Any]:
    return sorted({row["threads"] for row in store.rows("ops")}, key=str)


def sizes_measured(store: Store, op: str) -> list[str]:
    names = {row["case"] for row in store.rows("ops") if row["op"] == op}
    return [name for name in (f"{n} x {d}" for n, d in SIZES) if name in names]


def sizes(store: Store) -> Table:
    """The speed-up from one element to many."""
    rows = []
    for op, title in TITLES.items():
        for count in thread_counts(store):
            for case in sizes_measured(store, op):
                found = find(store, op, case, count)
                if "both_ms" in found.get("eager", {}):
                    cells = [times(found.get(n, {}).get("speed_up")) for n in (DISTRIBUTIONS, COMPILE, "fastkl")]
                    cells.append(times(found.get(LIMIT, {}).get("speed_up_high")))
                    ms = number(found["eager"]["both_ms"])
                    against = "-"
                    if COMPILE in found and "both_ms" in found[COMPILE] and "fastkl" in found:
                        against = times(found[COMPILE]["both_ms"] / found["fastkl"]["both_ms"])
                    rows.append([title, case, str(count or "GPU"), ms, *cells, against])
    note = (
        "Speed-ups over the eager one-liner, medians of rounds; the limit allocates and fills outputs and gradients, "
        "in its fastest rounds."
    )
    header = ["", "N x D", "threads", "eager, ms", DISTRIBUTIONS, COMPILE, "fastkl", "limit", f"fastkl over {COMPILE}"]
    return Table("KL, and sample + KL: forward and backward, float32", note, header, rows, 2)


def of_ops(store: Store) -> Iterator[Table]:
    """A table with every column for each number of threads."""
    header = ["op", "case", "contender", "forward ms", "backward ms", "both ms", "quartiles", "speed-up", "moved"]
    header += ["GB/s", "% copy", "peak", "kept", "launches", "host us"]
    for count in reversed(thread_counts(store)):
        rows, before = [], None
        for r in store.rows("ops"):
            if r["threads"] != count or r["provider"] in (COPY, LIMIT):
                continue
            name = (r["op"], r["case"])
            first, before = name != before, name
            start = [*(name if first else ("", "")), r["provider"]]
            if r.get("note"):
                rows.append([*start, "", "", "not timed", r["note"], *[""] * 8])
                continue
            moved = "-"
            if isinstance(r.get("bytes_forward"), int):
                moved = size(r["bytes_forward"] + r["bytes_backward"])
            quartiles = f"{number(r['both_ms_low'])} to {number(r['both_ms_high'])}"
            cells = [number(r["forward_ms"]), number(r["backward_ms"]), number(r["both_ms"]), quartiles]
            cells += [times(r.get("speed_up")), moved, number(r.get("gigabytes_per_second"))]
            cells += [number(r.get("percent_of_copy")), size(r.get("peak_bytes")), size(r.get("saved_bytes"))]
            rows.append([*start, *cells, pair(r, "launches"), number(r.get("host_us"))])
        note = (
            "Moved: eager, each op's reads and writes; torch.compile, Inductor's account; fastkl, the traffic of its "
            "GPU kernels. GB/s and % copy: that traffic over the time, beside a copy of as many bytes. "
            "Host: a step without data."
        )
        where = "on the GPU" if count == "" else f"on {count} thread{'s' * (count != 1)}"
        narrow = ("forward ms", "backward ms", "quartiles", "GB/s")
        yield Table(f"Every op, {where}", note, header, rows, 3, narrow)


def of_sweeps(store: Store) -> Table:
    rows = []
    for sweep in SWEEPS.values():
        for provider in ("eager", "fastkl"):
            own = [r for r in store.rows("sweeps") if r["op"] == sweep.name]
            if found := growth_of(own, sweep, provider, cache_bytes()):
                measured = [r for r in own if r["provider"] == provider]
                last = max(measured, key=lambda row: row["x"])
                cells = [number(last["both_ms"]), number(last["ns_per_element"])]
                cells += [f"{times(found.worst)} at {found.worst_at:,}", times(found.beyond_cache), found.verdict]
                rows.append([sweep.name, f"{sweep.axis} to {last['x']:,}", provider, *cells])
    note = (
        "Steps: time per element over that of the size before, above the overhead and net of allocating and filling "
        "the outputs and gradients; 1 is linear growth. Eager also allocates temporaries."
    )
    header = ["sweep", "", "contender", "ms at the end", "ns per element", "largest step", "beyond the cache", "growth"]
    return Table("Growth", note, header, rows, 3, ("ms at the end", "ns per element"))


def of_training(store: Store) -> Table:
    rows = []
    for r in store.rows("training_step"):
        quartiles = f"{number(r['both_ms_low'])} to {number(r['both_ms_high'])}"
        cells = [number(r["both_ms"]), quartiles, times(r["speed_up"]), size(r["peak_bytes"])]
        rows.append([r["case"], f"batch {r['batch']}", r["provider"], *cells])
    note = "The loss alone: sample, KL and likelihood, on the head and the logits of the same step."
    header = ["", "", "loss", "ms", "quartiles", "speed-up", "peak"]
    return Table("A training step with a large latent", note, header, rows, 3)
