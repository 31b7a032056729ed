"""The report of a run: figures as PNG and SVG, and a self-contained page with all figures and tables."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from bench.pictures import draw
from bench.store import Store
from bench.tables import Table, all_tables
from fastkl.vae.report import STYLE

CAPTIONS = {
    "bench_sizes": "Contenders are interleaved, forward and backward, on the same inputs. Bands are quartiles of the "
    "rounds. The limit only allocates and fills the outputs and the gradients: no op that returns new tensors can be "
    "faster.",
    "bench_ops": "Points to the right of 1 are faster than the eager formula. torch.distributions runs without "
    "argument checks.",
    "bench_costs": "Counted, not timed. Traffic: eager and torch.distributions by the reads and writes of each op, "
    "torch.compile by Inductor's account of its code for this machine, fastkl by the budget of its GPU kernels, which "
    "tests check. Peak: allocated at once beyond the inputs. Kept: between forward and backward, beyond the inputs.",
    "bench_sweeps": "A line of slope 1 is linear growth; in the flat part to the left, the host's overhead dominates.",
}
WIDE = "body { max-width: 76rem } .scroll { overflow-x: auto } td, th { padding-right: 0.9rem; white-space: nowrap }"


def write_report(store: Store, about: dict[str, Any]) -> Path:
    """Write figures and page into the results' folder and return the page's path."""
    images = {}
    for name, figure in draw(store, about).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        images[name] = buffer.getvalue()
        (store.folder / f"{name}.png").write_bytes(images[name])
        figure.savefig(store.folder / f"{name}.svg", format="svg", metadata={"Date": None})
    path = store.folder / "report.html"
    path.write_text(page(all_tables(store), images, about), encoding="utf-8")
    return path


def facts(about: dict[str, Any]) -> str:
    threads = " and ".join(map(str, about["threads"]))
    parts = [f"{about['cores']} cores", f"{about['cache_mib']} MiB of cache", f"{threads} threads"]
    parts += [f"torch {about['torch']}", f"Python {about['python']}"]
    parts += [f"commit {about['commit']}"] * bool(about["commit"])
    if about["device"] != about["cpu"]:
        parts = [about["cpu"], *parts]
    if about["load_before"] is not None:
        parts.append(f"load {about['load_before']} in the minute before")
    return ", ".join(parts)


def page(tables: list[Table], images: dict[str, bytes], about: dict[str, Any]) -> str:
    """A self-contained HTML page; all text is escaped."""
    title = html.escape(f"fastkl on {about['device']}")
    figures = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f'<p class="note">{html.escape(CAPTIONS[name])}</p>'
        for name, content in images.items()
    )
    quick = " <b>A quick run: small sizes and few rounds.</b>" if about["quick"] else ""
    notes = (
        "Medians of interleaved rounds; speed-ups are medians of the ratios within a round. A contender that does not "
        "match the definition in float64 is not timed."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}{WIDE}</style></head><body><h1>{title}</h1>"
        f'<p class="note">{about["date"]}: {html.escape(facts(about))}. {notes}{quick}</p>'
        f"{figures}{''.join(map(section, tables))}</body></html>\n"
    )


def section(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' * (i >= table.words)}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<h2>{html.escape(table.title)}</h2><p class="note">{html.escape(table.note)}</p>'
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    )
