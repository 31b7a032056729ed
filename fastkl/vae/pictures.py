"""The figures of the report, in matplotlib: axes have units, and colours suit colour-blind readers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.monitors import ACTIVE
from fastkl.vae import clusters
from fastkl.vae.errors import require
from fastkl.vae.evaluate import Evaluation
from fastkl.vae.events import shades
from fastkl.vae.prior import draw as draw_latents
from fastkl.vae.prior import is_mixture
from fastkl.vae.run import Run

# Paul Tol's muted scheme, distinct for any kind of colour vision; the tenth colour is black. Groups that share a colour
# have different markers.
COLOURS = (
    "#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#000000",
)  # fmt: skip
PALE = ("#88ccee", "#ddcc77", "#44aa99")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
BLUE, RED, GREY = "#0072b2", "#d55e00", "#555555"
STYLE = {
    "font.size": 11, "axes.titlesize": 13, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "legend.frameon": False, "figure.constrained_layout.use": True, "figure.dpi": 110, "savefig.dpi": 110,
}  # fmt: skip


@torch.no_grad()
def draw(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """name -> figure, in the order of the report. Vector data have no sample or reconstruction pictures."""
    matplotlib = require("matplotlib", "The report (--no-report skips it)")
    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        figures = {"loss_curves": loss_curves(run)}
        if any(name.startswith("terms/") for name in run.history):
            figures["objective_terms"] = objective_terms(run)
        if len(run.data.shape) > 1:
            figures["reconstructions"] = reconstructions(run)
            figures["samples"] = samples(run)
        if is_mixture(run.prior):
            if len(run.data.shape) > 1:
                figures["components"] = components(run, evaluation)
            figures["component_usage"] = component_usage(evaluation)
            figures["kl_bracket"] = kl_bracket(run)
        figures["latent_space"] = latent_space(run, evaluation)
        figures["kl_per_dimension"] = kl_per_dimension(run, evaluation)
        for figure in figures.values():
            figure.canvas.draw()  # computes the layout while this style is active
    return figures


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # pyplot would keep figures alive and may open windows

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns)


def loss_curves(run: Run) -> Any:
    figure, panels = new_figure(10.5, 3.8, 1, 3)
    names = ("train", run.data.watched_name)
    train, test = (np.array(run.history[name]).reshape(-1, 4) for name in names)
    for panel, column, title in zip(panels, (1, 3, 2), ("ELBO", "Reconstruction, E[log p(x|z)]", "KL(q(z|x) || p(z))")):
        panel.plot(train[:, 0], train[:, column], color=BLUE, linewidth=1, alpha=0.75, label="training")
        panel.plot(test[:, 0], test[:, column], color=RED, marker="o", markersize=3.5, linewidth=1.6, label=names[1])
        panel.set(title=title, xlabel="step", ylabel="nats per datum")
        if len(train) > 20:  # without the first steps, whose range would flatten the rest
            shown = np.concatenate([train[len(train) // 20 :, column], test[1:, column]])
            room = 0.06 * max(np.ptp(shown), 1e-6)
            panel.set_ylim(shown.min() - room, shown.max() + room)
    panels[0].legend(loc="lower right")
    return figure


def objective_terms(run: Run) -> Any:
    """A panel for each term of the objective other than reconstruction and KL."""
    curves = {name.partition("/")[2]: rows for name, rows in run.history.items() if name.startswith("terms/")}
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, panels = new_figure(3.5 * columns, 0.6 + 2.9 * rows, rows, columns)
    headline(figure, f"Terms of {run.settings.objective} other than reconstruction and KL")
    panels = np.atleast_1d(panels).flatten()
    for panel, (name, values) in zip(panels, curves.items()):
        step, value = np.array(values).T
        panel.plot(step, value, color=BLUE, linewidth=1)
        panel.set(title=name.replace("_", " "), xlabel="step")
        if len(value) > 20:  # as in the loss curves
            shown = value[len(value) // 20 :]
            room = 0.06 * max(np.ptp(shown), 1e-6)
            panel.set_ylim(shown.min() - room, shown.max() + room)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    return figure


def large(run: Run) -> bool:
    """Whether the pictures are large, or the frames of videos: fewer of them are shown."""
    return run.data.shape[-1] > 64 or len(run.data.shape) == 4


def reconstructions(run: Run, columns: int = 12) -> Any:
    """Test images above their decoded posterior means."""
    columns = min(columns, len(run.data.test), 4 if large(run) else 12)
    x = run.data.test[:columns]
    mean = run.vae.posterior(x.to(run.device)).mean
    figure, panels = new_figure(0.85 * max(columns, 8) + 0.6, 3.0 * max(columns, 8) / columns * 0.75, 2, columns)
    headline(figure, "Test images (top) and their reconstructions (bottom)")
    for row, pictures in zip(np.atleast_2d(panels), (x, run.vae.pictured(mean))):
        for panel, picture in zip(row, shades(pictures, run.data)):
            show(panel, picture)
    return figure


def samples(run: Run) -> Any:
    side = 4 if large(run) else 8
    z = draw_latents(run.prior, run.vae, side * side, run.settings.seed, "samples")
    drawn = decoded(run, z)
    figure, panels = new_figure(6.4, 6.8, side, side)
    headline(figure, "Samples: decoded draws from the prior")
    for panel, picture in zip(panels.flat, shades(drawn, run.data)):
        show(panel, picture)
    return figure


def decoded(run: Run, z: Tensor) -> Tensor:
    return torch.cat([run.vae.pictured(part.to(run.device)).cpu() for part in z.split(16)])


def components(run: Run, evaluation: Evaluation, rows: int = 20, columns: int = 10) -> Any:
    """A row of samples for each component, the most used first."""
    assert evaluation.responsibilities is not None, "of a mixture"
    shares = clusters.shares(evaluation.responsibilities)
    chosen = shares.argsort(descending=True)[:rows].tolist()
    columns = 4 if large(run) else columns
    # Two components side by side, for a figure that is not too tall.
    halves = 2 if len(chosen) > 5 else 1
    height = -(-len(chosen) // halves)
    figure, panels = new_figure(0.5 * halves * (columns + 2) + 0.3, 0.5 * height + 0.6, height, halves * (columns + 1))
    headline(figure, "Samples of each component, with its share of the test data")
    panels = np.atleast_2d(panels)
    for panel in panels.flat:
        panel.set_axis_off()
    for place, component in enumerate(chosen):
        row = panels[place % height, place // height * (columns + 1) :][: columns + 1]
        row[0].text(0.9, 0.5, f"{100 * shares[component]:.1f} %", ha="right", va="center", transform=row[0].transAxes)
        z = draw_latents(run.prior, run.vae, columns, run.settings.seed, "components", component)
        for panel, picture in zip(row[1:], shades(decoded(run, z), run.data)):
            show(panel, picture)
    return figure


def component_usage(evaluation: Evaluation) -> Any:
    """Mean responsibilities over the test data, the largest first."""
    assert evaluation.responsibilities is not None, "of a mixture"
    figures = clusters.usage(evaluation.responsibilities)
    shares = clusters.shares(evaluation.responsibilities).sort(descending=True).values
    figure, panel = new_figure(8.6, 3.8)
    colours = [BLUE if used else "#bbbbbb" for used in clusters.used(shares)]
    panel.bar(range(1, len(shares) + 1), 100 * shares.numpy(), color=colours, width=0.8)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.axhline(100 / len(shares), color=GREY, linewidth=1, linestyle="--")
    panel.set(
        title="Component usage", xlabel="component, most used first", ylabel="mean responsibility, % of test data"
    )
    panel.set_ylim(bottom=0)
    panel.grid(axis="x", visible=False)
    panel.tick_params(axis="x", length=0)
    used, entropy = figures["used_components"], figures["usage_entropy"]
    note = f"{used} of {len(shares)} used (blue); entropy {entropy:.2f} of at most {math.log(len(shares)):.2f} nats"
    note += "\ndashed line: equal use"
    panel.annotate(note, (0.99, 0.95), xycoords="axes fraction", ha="right", va="top", color=GREY)
    return figure


def kl_bracket(run: Run) -> Any:
    """The estimated KL to the mixture over the epochs, with its lower and upper bound."""
    figure, panel = new_figure(8.6, 3.8)
    rows = np.array(run.history["mixture"])
    epochs = rows[:, 0] / run.steps_per_epoch
    panel.fill_between(epochs, rows[:, 1], rows[:, 3], color=BLUE, alpha=0.18, linewidth=0)
    panel.plot(epochs, rows[:, 3], color=BLUE, linewidth=1.6, marker="v", markersize=4, label="upper bound")
    panel.plot(epochs, rows[:, 2], color=RED, linewidth=1.6, marker="o", markersize=4, label="16 samples per datum")
    panel.plot(epochs, rows[:, 1], color=BLUE, linewidth=1.6, marker="^", markersize=4, label="lower bound")
    panel.set(title="KL to the mixture, and its bounds", xlabel="epoch", ylabel="nats per test datum")
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def headline(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=13, weight="bold")


def show(panel: Any, picture: Tensor) -> None:
    panel.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    panel.set_axis_off()


def latent_space(run: Run, evaluation: Evaluation) -> Any:
    """Posterior means of the test data: the two latent dimensions, or the first two principal components."""
    figure, panel = new_figure(8.6, 6.4)
    places, names = plane(evaluation.means.flatten(1))
    points = places[:5000].numpy()
    if run.data.test_labels is None or run.data.label_names is None:
        panel.scatter(*points.T, s=24, alpha=0.7, color=BLUE, linewidths=0)
    else:
        scatter_groups(panel, points, run.data.test_labels[: len(points)].numpy(), run.data.label_names)
    panel.set(title=f"Latent space: posterior means of {len(points)} test data", xlabel=names[0], ylabel=names[1])
    return figure


def scatter_groups(panel: Any, points: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    groups = np.unique(labels)
    centres = spaced(np.stack([np.median(points[labels == group], axis=0) for group in groups]), np.ptp(points, axis=0))
    for group, centre in zip(groups, centres):
        colour, marker = COLOURS[group % len(COLOURS)], MARKERS[group // len(COLOURS) % len(MARKERS)]
        style = {"color": colour, "marker": marker, "alpha": 0.75, "linewidths": 0, "s": 32}
        panel.scatter(*points[labels == group].T, label=names[group], **style)
        if len(names[group]) <= 3:  # short names are also written on the groups, for readers who do not see colours
            circle = {"boxstyle": "circle,pad=0.2", "facecolor": colour, "edgecolor": "white", "linewidth": 1.5}
            ink = "black" if colour in PALE else "white"
            panel.annotate(names[group], centre, ha="center", va="center", weight="bold", color=ink, bbox=circle)
    panel.legend(title="label", loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.4)


def spaced(centres: np.ndarray, extent: np.ndarray, least: float = 0.055) -> np.ndarray:
    """Push apart centres closer than `least` of the picture, so that no name hides another."""
    places = centres / np.maximum(extent, 1e-12)
    for _ in range(50):
        for one in range(len(places)):
            for other in range(one):
                apart = places[one] - places[other]
                distance = np.hypot(*apart)
                if distance < least:
                    push = (least - distance) / 2 * (apart / distance if distance else np.array([1.0, 0.0]))
                    places[one] += push
                    places[other] -= push
    return places * np.maximum(extent, 1e-12)


def plane(means: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """(places [N, 2] of posterior means [N, D], names of the two axes)."""
    if means.shape[1] == 1:
        return torch.cat([means, torch.zeros_like(means)], dim=1), ("latent dimension 0", "(one dimension)")
    if means.shape[1] == 2:
        return means, ("latent dimension 0", "latent dimension 1")
    centred = means - means.mean(dim=0)
    # By the N x N Gram matrix: a spatial latent has far more dimensions than the number of test data.
    values, vectors = torch.linalg.eigh((centred @ centred.T).double())
    values, vectors = values.flip(0)[:2].clamp_min(0), vectors.flip(1)[:, :2]
    share = 100 * values / max(centred.double().square().sum().item(), 1e-300)
    first, second = (f"{part:.0f} % of the variance" for part in share.tolist())
    return (vectors * values.sqrt()).float(), (f"principal component 1 ({first})", f"principal component 2 ({second})")


def kl_per_dimension(run: Run, evaluation: Evaluation) -> Any:
    """Bars of the KL per latent dimension; a spatial latent is summed over positions, which shows the total."""
    shape = run.vae.latent_shape
    spatial = len(shape) > 1
    kl = evaluation.kl_per_dim.flatten(1).sum(1) if spatial else evaluation.kl_per_dim
    active = evaluation.means.flatten(2).var(dim=0).amax(dim=1) if spatial else evaluation.means.var(dim=0)
    order = kl.argsort(descending=True)
    figure, panel = new_figure(8.6, 3.8)
    colours = [BLUE if active[index] > ACTIVE else "#bbbbbb" for index in order]
    panel.bar(range(len(kl)), kl[order].numpy(), color=colours, width=0.8)
    if len(kl) <= 40:
        panel.set_xticks(range(len(kl)), [str(int(index)) for index in order])
        panel.tick_params(axis="x", length=0)
    unit = "channel" if spatial else "latent dimension"
    where = f", summed over {' x '.join(map(str, shape[1:]))} positions" if spatial else ""
    target = "" if run.prior is None else " to N(0, I)"
    panel.set(
        title=f"KL{target} per {unit}{where}", xlabel=f"{unit}, largest KL first", ylabel="nats per datum, test mean"
    )
    panel.grid(axis="x", visible=False)
    # From 0: a collapsed posterior has a KL of 0, up to rounding.
    panel.set_ylim(bottom=0)
    note = f"total {kl.sum():.2f} nats;  {evaluation.active_units} of {math.prod(shape)} units active (blue)"
    panel.annotate(note, (0.99, 0.95), xycoords="axes fraction", ha="right", va="top", color=GREY)
    return figure
