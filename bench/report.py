"""The end of a run: pictures as PNG and SVG, and one self-contained page with them and every table."""

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
    "bench_sizes": "Every contender takes turns with the others, forward and backward, on the same inputs. Bands are "
    "quartiles of the rounds. The limit allocates and fills the outputs and the gradients and computes nothing: what "
    "no op that returns new tensors can beat.",
    "bench_ops": "Right of the line at 1 is faster than the eager formula. torch.distributions runs without the checks "
    "of its arguments.",
    "bench_costs": "Counted, not timed. Traffic: eager and torch.distributions by the reads and writes of each op, "
    "torch.compile by Inductor's own account of the code it makes on this machine, fastkl by the written budget of its "
    "GPU kernels, to which tests hold them. Peak: allocated at once beyond the inputs. Kept: between forward and "
    "backward, beyond the inputs.",
    "bench_sweeps": "A straight line of slope 1 is linear growth; to the left, where the curves are flat, a step costs "
    "what the host spends on it.",
}
WIDE = "body { max-width: 76rem } .scroll { overflow-x: auto } td, th { padding-right: 0.9rem; white-space: nowrap }"


def write_report(store: Store, about: dict[str, Any]) -> Path:
    """Everything into the results' folder; returns the page's path."""
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
    """One file that needs no other; all text is escaped."""
    title = html.escape(f"fastkl on {about['device']}")
    figures = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f'<p class="note">{html.escape(CAPTIONS[name])}</p>'
        for name, content in images.items()
    )
    quick = " <b>A quick run: small sizes and few rounds.</b>" if about["quick"] else ""
    notes = (
        "Medians of interleaved rounds; speed-ups are medians of the ratios within a round. What does not match the "
        "definition in float64 is not timed."
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
