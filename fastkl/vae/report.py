"""The report of a run: metrics.json, the pictures, and one page with all of them."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
from typing import Any

import torch

from fastkl.vae import checkpoint, facts, memory
from fastkl.vae.evaluate import Evaluation
from fastkl.vae.pictures import draw
from fastkl.vae.run import Run
from fastkl.vae.settings import Settings

CAPTIONS = {
    "loss_curves": "The ELBO is the reconstruction term minus the KL. The model overfits if the held-out curve falls "
    "while the training curve rises.",
    "objective_terms": "Means over the batches, in nats or in the units of the distance. The documentation of "
    "fastkl.objectives defines each term.",
    "reconstructions": "Decoded from the posterior mean.",
    "samples": "Decoded from draws of the prior.",
    "components": "Decoded from draws of single components of the prior. A component that represents one kind of image "
    "draws only this kind. Training used no labels.",
    "component_usage": "The share of the test data in each component: the mean over the data of the probability that a "
    "datum came from it. A component below a tenth of an equal share counts as unused.",
    "kl_bracket": "The KL to a mixture has no closed form: samples estimate it, and two bounds without samples enclose "
    "it. Before the first point, during the warm-up, the prior was N(0, I).",
    "latent_space": "Posterior means of held-out test data. Training used no labels.",
    "kl_per_dimension": "A dimension whose KL to N(0, I) is near 0 carries no information: its posterior is the same "
    "for all data. (The KL to another prior is not a sum over dimensions.)",
}
# Alternative texts of the pictures.
ALTS = {
    "loss_curves": "Three curves over the steps, of training and held-out data: ELBO, reconstruction and KL.",
    "objective_terms": "A curve over the steps for each further term of the objective.",
    "reconstructions": "A row of test images above a row of their reconstructions.",
    "samples": "A square of images decoded from draws of the prior.",
    "components": "For each component of the prior a row of images decoded from it, beside its share of the test data.",
    "component_usage": "Bars of the share of the test data that each component has, the largest first.",
    "kl_bracket": "The KL to the mixture over the epochs, between its lower and its upper bound.",
    "latent_space": "Posterior means of the test data as points in a plane, coloured by label if there are labels.",
    "kl_per_dimension": "Bars of the KL of each latent dimension, the largest first; active ones are blue.",
}
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #555; --line: #ddd; --mark: #fff3d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #181a1b; --soft: #a8a8a8; --line: #444; --mark: #453a1c }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem } .note { color: var(--soft) }
.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0.8rem; margin: 1.5rem 0 }
@media (max-width: 45rem) { .figures { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)) } }
.figure { border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.7rem 1rem }
.figure b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; white-space: nowrap }
.figure small { color: var(--soft) }
.warning { border-left: 4px solid #d55e00; padding-left: 0.8rem }
img { max-width: 100%; height: auto; background: #fff; border-radius: 0.3rem }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: 0.9rem }
td, th { text-align: left; padding: 0.15rem 1.5rem 0.15rem 0; vertical-align: top }
td { overflow-wrap: anywhere } td:first-child { white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr.changed td { background: var(--mark); font-weight: 600 }
"""


def write_report(run: Run, evaluation: Evaluation, more: dict[str, Any]) -> dict[str, Any]:
    """Write the report into the run folder and return the metrics. `more`: further entries of the metrics."""
    metrics = {
        **evaluation.figures(),
        "step": run.step,
        "parameters": sum(parameter.numel() for parameter in run.vae.parameters()),
        "training_data": len(run.data.train),
        "training_seconds": run.seconds,
        "skipped_steps": run.guard.skipped,
        "warnings": [{"step": step, "warning": line} for step, line in run.watch.warned],
        "torch": torch.__version__,
        "starts": facts.starts(run.folder),
        **more,
    }
    images = {name: png(figure) for name, figure in draw(run, evaluation).items()}
    pictures = run.folder / "pictures"
    checkpoint.prepare(pictures)
    for name, picture in images.items():
        checkpoint.write(pictures / f"{name}.png", picture)
    history = {name: [named(name, row) for row in rows] for name, rows in run.history.items()}
    content = json.dumps(strict({**metrics, "history": history}), indent=2, allow_nan=False) + "\n"
    checkpoint.write(run.folder / "metrics.json", content.encode())
    checkpoint.write(run.folder / "report.html", page(run, metrics, images).encode())
    return metrics


def named(curve: str, row: list[float]) -> dict[str, Any]:
    """A row of the history with the names of its columns."""
    group, _, name = curve.partition("/")
    if group == "mixture":
        return dict(zip(("step", "kl_lower", "kl", "kl_upper", "used_components", "tau"), row))
    if not name:
        return dict(zip(("step", "elbo", "kl", "reconstruction"), row))
    return {"step": row[0], name: row[1:] if name == "kl_per_dimension" else row[1]}


def strict(value: Any) -> Any:
    """The value with None (null) for numbers that are not finite, which JSON cannot hold.

    For instance, a single test datum has a standard error of NaN.
    """
    if isinstance(value, dict):
        return {name: strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def summary(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, explanation) of the main figures."""

    def nats(name: str) -> str:
        error = metrics[name + "_standard_error"]
        return f"{metrics[name]:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")  # NaN for a single datum

    samples = f"{metrics['importance_samples']:,}"
    figures = [
        ("ELBO", nats("elbo"), "nats per test datum, ± standard error"),
        ("log p(x)", nats("log_prob"), f"nats, importance-weighted with {samples} samples"),
        ("Reconstruction", nats("reconstruction"), "nats, E[log p(x|z)]"),
        ("KL", nats("kl"), "nats, from posterior to prior"),
        ("Active units", f"{metrics['active_units']:,} of {metrics['latent_units']:,}", "Var(E[z|x]) above 0.01"),
        ("I(x; z)", f"{metrics['mutual_information']:.2f}", "nats, mutual information of datum and latent"),
    ]  # fmt: skip
    if "bits_per_dimension" in metrics:
        figures.insert(2, ("Bits per dimension", f"{metrics['bits_per_dimension']:.3f}", "-log2 p(x) of a value"))
    if "psnr" in metrics:
        errors = f"dB, of E[x|mean of z]; mean error {metrics['absolute_error']:.3g} of the range"
        figures.append(("PSNR", f"{metrics['psnr']:.2f}", errors))
    if "components" in metrics:
        used, entropy = metrics["used_components"], metrics["usage_entropy"]
        figures += [
            ("KL bounds", f"{metrics['kl_lower']:.2f} to {metrics['kl_upper']:.2f}", "nats, without samples"),
            ("Used components", f"{used} of {metrics['components']}", f"entropy of their use {entropy:.2f} nats"),
        ]  # fmt: skip
    if "clustering_accuracy" in metrics:
        figures += [
            ("Clustering accuracy", f"{metrics['clustering_accuracy']:.3f}", "one component per label, at best 1"),
            ("Cluster purity", f"{metrics['cluster_purity']:.3f}", "components by their most frequent label"),
            ("Mutual information", f"{metrics['normalised_mutual_information']:.3f}", "with the labels, normalised"),
        ]  # fmt: skip
    return figures


def page(run: Run, metrics: dict[str, Any], images: dict[str, bytes]) -> str:
    """A self-contained HTML page: inline styles, images as data URIs. Text from files and options is escaped."""
    title = html.escape(f"{run.data.name}: {run.settings.description}")
    tiles = "".join(
        f'<div class="figure"><small>{html.escape(name)}</small><b>{html.escape(value)}</b>'
        f"<small>{html.escape(text)}</small></div>"
        for name, value, text in summary(metrics)
    )
    figures = "".join(
        f"<h2>{name.replace('_', ' ').replace('kl ', 'KL ').capitalize().replace('Kl', 'KL')}</h2>"
        f'<p class="note">{html.escape(CAPTIONS[name])}</p>'
        f'<img alt="{html.escape(ALTS[name])}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in images.items()
    )
    lines = [f"Step {row['step']}: {row['warning']}." for row in metrics["warnings"]]
    if metrics["skipped_steps"]:
        lines.append(f"{metrics['skipped_steps']} steps were skipped: their loss or gradient was not finite.")
    warnings = "".join(f'<p class="warning">{html.escape(line)}</p>' for line in lines)
    summed = (
        f"{run.data.counts.replace('training', 'training data')} of shape {' x '.join(map(str, run.data.shape))}; "
        f"{run.data.values}. {metrics['parameters']:,} parameters; {metrics['step']:,} steps in "
        f"{metrics['training_seconds']:.0f} s."
    )
    notes = "".join(f'<p class="note">{html.escape(line)}</p>' for line in (summed, run.data.note))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{notes}"
        f'<div class="figures">{tiles}</div>{warnings}{memory_table(metrics["loss_share"])}{figures}'
        f"{provenance(metrics['starts'])}{settings_table(run.settings)}</body></html>\n"
    )


def provenance(starts: list[dict[str, Any]]) -> str:
    """A table of the run's provenance: all facts of its last start, and date and differences of earlier ones."""
    if not starts:
        return ""
    *earlier, last = starts
    rows = [(name.replace("_", " "), value) for name, value in last.items() if value is not None]
    for one in earlier:
        other = [f"{name} {value}" for name, value in one.items() if name != "date" and value != last.get(name)]
        rows.append(("begun" if one is starts[0] else "resumed", "; ".join([str(one.get("date", "?")), *other])))
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(words(value))}</td></tr>" for name, value in rows
    )
    return f'<h2>How it was made</h2><div class="table"><table>{cells}</table></div>'


def words(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def settings_table(settings: Settings) -> str:
    """A table of all options. Those that differ from the default are marked by colour and by a note."""
    rows = ""
    for item in dataclasses.fields(settings):
        value, default = getattr(settings, item.name), item.default
        shown = [html.escape(str(each)) or "(none)" for each in (value, default)]
        name = "--" + html.escape(item.name.replace("_", "-"))
        mark, note = (' class="changed"', f"changed from {shown[1]}") if value != default else ("", "")
        rows += f"<tr{mark}><td>{name}</td><td>{shown[0]}</td><td>{note}</td></tr>"
    return f'<h2>Settings</h2><div class="table"><table>{rows}</table></div>'


def memory_table(costs: dict[str, Any]) -> str:
    """A table of the memory and time of the loss."""
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in memory.table(costs)
    )
    return (
        f'<h2>Memory and time of the loss</h2><p class="note">{html.escape(costs["what"])}</p>'
        '<div class="table"><table><tr><th></th>'
        f"<th>kept for backward</th><th>peak</th><th>forward and backward</th></tr>{rows}</table></div>"
    )
