"""The figures of the benchmark, in matplotlib; a contender has the same colour and marker in all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.measure import COMPILE, LIMIT
from bench.store import Store
from bench.sweeps import SWEEPS
from bench.tables import DISTRIBUTIONS, TITLES, find, sizes_measured, thread_counts
from fastkl.vae.pictures import BLUE, GREY, RED, STYLE, headline, new_figure

# Colours that colour-blind readers can tell apart (Okabe and Ito), and markers for readers without colours.
LOOKS = {
    "eager": (GREY, "s"), DISTRIBUTIONS: ("#cc79a7", "v"), COMPILE: (RED, "^"), "fastkl": (BLUE, "o"),
    LIMIT: ("#999999", ""), "geomloss": ("#009e73", "D"), "pykeops": ("#e69f00", "P"),
}  # fmt: skip
# The ops of the figure of memory, each with the largest case that all machines measure.
COSTS = (("kl_normal", "4096 x 8192"), ("rsample_kl", "4096 x 8192"), ("rsample_normal", "4096 x 512"),
         ("bernoulli_log_prob", "4096 x 784"), ("normal_log_prob", "4096 x 784"))  # fmt: skip


def draw(store: Store, about: dict[str, Any]) -> dict[str, Any]:
    """name -> figure, for the parts that have results."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        figures = {
            "bench_sizes": sizes(store, about), "bench_ops": ops(store, about), "bench_costs": costs(store),
            "bench_sweeps": sweeps(store, about),
        }  # fmt: skip
        figures = {name: figure for name, figure in figures.items() if figure is not None}
        for figure in figures.values():
            figure.canvas.draw()  # computes the layout while this style is active
    return figures


def where(about: dict[str, Any]) -> str:
    return about["device"]


def plain(axis: Any) -> None:
    """Set ticks at 1, 2, 5, 10, ..., or over many decades at powers of ten, in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 1000 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def sizes(store: Store, about: dict[str, Any]) -> Any:
    """Speed-up over eager against the size, for the KL and for sample + KL."""
    counts = [count for count in thread_counts(store) if any(find(store, "kl_normal", c, count) for c in
              sizes_measured(store, "kl_normal"))]  # fmt: skip
    panels_of = [(op, count) for op in TITLES for count in counts if sizes_measured(store, op)]
    if not panels_of:
        return None
    columns = min(2, len(counts)) if len(counts) > 1 else min(2, len(panels_of))
    rows = -(-len(panels_of) // columns)
    figure, panels = new_figure(5.4 * columns + 0.4, 3.3 * rows + 0.9, rows, columns)
    headline(figure, f"Speed-up over the eager one-liner, forward + backward ({where(about)})")
    panels = np.atleast_1d(panels).flatten()
    for panel, (op, count) in zip(panels, panels_of):
        names = sizes_measured(store, op)
        found = [find(store, op, name, count) for name in names]
        for name in (LIMIT, DISTRIBUTIONS, COMPILE, "fastkl"):
            at = [i for i, rows in enumerate(found) if isinstance(rows.get(name, {}).get("speed_up"), float | int)]
            if not at:
                continue
            middle, low, high = (
                np.array([found[i][name][f"speed_up{part}"] for i in at], float) for part in ("", "_low", "_high")
            )
            colour, marker = LOOKS[name]
            line = "--" if name == LIMIT else "-"
            middle = high if name == LIMIT else middle  # the fastest rounds: a limit is not passed
            panel.plot(at, middle, line, color=colour, marker=marker, markersize=5, linewidth=1.6, label=name)
            if name != LIMIT:
                panel.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.axhline(1, color=LOOKS["eager"][0], linewidth=1.6, label="eager")
        panel.set_yscale("log")
        plain(panel.yaxis)
        panel.set_xticks(range(len(names)), [name.replace(" x ", "\nx ") for name in names], fontsize=9)
        threads = "" if count == "" else f", {count} thread{'s' * (count != 1)}"
        panel.set(title=f"{TITLES[op]}{threads}", ylabel="times as fast as eager")
    for panel in panels[len(panels_of) :]:
        panel.set_axis_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    return figure


def ops(store: Store, about: dict[str, Any]) -> Any:
    """Every case at the most threads, as a dot for each contender."""
    count = thread_counts(store)[-1] if store.rows("ops") else None
    names = list(dict.fromkeys((r["op"], r["case"]) for r in store.rows("ops") if r["threads"] == count))
    found = {name: find(store, *name, count) for name in names}
    names = [name for name in names if found[name].get("fastkl", {}).get("speed_up")]
    if not names:
        return None
    figure, panel = new_figure(9.2, 0.26 * len(names) + 1.4)
    threads = "" if count == "" else f", {count} thread{'s' * (count != 1)}"
    headline(figure, f"Every op: speed-up over the eager formula ({where(about)}{threads})")
    seen = set()
    for place, name in enumerate(reversed(names)):
        for provider, row in found[name].items():
            if provider in ("eager", LIMIT) or provider not in LOOKS or not row.get("speed_up"):
                continue
            colour, marker = LOOKS[provider]
            label = None if provider in seen else provider
            seen.add(provider)
            panel.plot(row["speed_up"], place, marker, color=colour, markersize=6, label=label, alpha=0.9)
    panel.axvline(1, color=LOOKS["eager"][0], linewidth=1)
    panel.set_xscale("log")
    plain(panel.xaxis)
    panel.set_yticks(range(len(names)), [f"{op}  {case}" for op, case in reversed(names)], fontsize=8)
    panel.set_ylim(-0.7, len(names) - 0.3)
    panel.set(xlabel="times as fast as eager, forward + backward")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return figure


def costs(store: Store) -> Any:
    """Traffic, peak memory and saved memory in units of one input; they do not depend on the machine."""
    measured = []
    for op, case in COSTS:
        rows = [r for r in store.rows("ops") if (r["op"], r["case"]) == (op, case) and not r.get("note")]
        if rows:
            measured.append((f"{op}\n{case}", {r["provider"]: r for r in rows}))
    if not measured:
        return None
    kinds = (("bytes", "memory traffic"), ("peak_bytes", "peak memory"), ("saved_bytes", "kept for backward"))
    figure, panels = new_figure(11.5, 0.85 * len(measured) + 1.6, 1, 3)
    headline(figure, "Traffic, peak and saved memory of a step, in units of one latent tensor")
    providers = ("fastkl", COMPILE, "eager", DISTRIBUTIONS)
    for panel, (key, title) in zip(panels, kinds):
        for place, (_, rows) in enumerate(reversed(measured)):
            for index, name in enumerate(providers):
                row = rows.get(name, {})
                value = row.get(key, "")
                if key == "bytes" and isinstance(row.get("bytes_forward"), int):
                    value = row["bytes_forward"] + row["bytes_backward"]
                if not isinstance(value, int | float):
                    continue
                units, height = value / row["latent_bytes"], place + 0.3 - 0.2 * index
                panel.barh(height, units, 0.18, color=LOOKS[name][0], label=name if place == 0 else None)
                label = (
                    f" {round(units, 2):.2g}" if units < 9.5 else f" {units:.0f}"
                )  # 8 bytes of a seed are rounded to 0
                panel.annotate(label, (units, height), va="center", fontsize=8, color=GREY)
        panel.set(title=title, xlabel="units of one latent tensor")
        panel.grid(axis="y", visible=False)
        panel.set_yticks(range(len(measured)), [label for label, _ in reversed(measured)] if key == "bytes" else [])
        panel.tick_params(axis="y", length=0, labelsize=9)
        panel.margins(x=0.15)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def sweeps(store: Store, about: dict[str, Any]) -> Any:
    """Time against size, both logarithmic, with a line of slope 1."""
    names = [name for name in SWEEPS if any(row["op"] == name for row in store.rows("sweeps"))]
    if not names:
        return None
    lines = math.ceil(len(names) / 3)
    figure, panels = new_figure(11.5, 3.2 * lines + 0.6, lines, min(3, len(names)))
    headline(figure, f"Time of a step against its size ({where(about)})")
    panels = np.atleast_1d(panels).flatten()
    for panel, name in zip(panels, names):
        for provider in ("eager", "fastkl"):
            rows = [r for r in store.rows("sweeps") if (r["op"], r["provider"]) == (name, provider)]
            points = np.array(sorted((r["x"], r["both_ms"], r["both_ms_low"], r["both_ms_high"]) for r in rows), float)
            colour, marker = LOOKS[provider]
            panel.plot(points[:, 0], points[:, 1], marker=marker, color=colour, markersize=4, label=provider)
            panel.fill_between(points[:, 0], points[:, 2], points[:, 3], color=colour, alpha=0.2, linewidth=0)
        end = points[-1]
        panel.plot([end[0] / 1000, end[0]], [end[1] / 1000, end[1]], ":", color="black", linewidth=1, label="linear")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(title=name, xlabel=SWEEPS[name].axis, ylabel="ms, forward + backward")
        panel.title.set_fontsize(11)
        least = min(row["both_ms_low"] for row in store.rows("sweeps") if row["op"] == name)
        panel.set_ylim(bottom=least / 1.5)  # the dotted line may begin below
        plain(panel.yaxis)
        if points[-1, 0] < 4**6:  # few sizes: no half powers
            panel.set_xticks(points[:, 0])
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    panels[0].legend(loc="upper left", fontsize=9)
    return figure
