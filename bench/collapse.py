"""Posterior collapse and its remedies, compared on a decoder that can ignore the latent.

study.py has the usage and the place of the results. The figures are the use of the latent (mutual information, KL,
active units) and its cost (ELBO, log p(x)). Grey values are binarised at random, the same for all runs, because the
decoder reads them.
"""

from __future__ import annotations

import statistics

from study import HERE, Study

# Name: options. Thresholds and capacities are 3 nats in total, over 16 dimensions.
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
    "InfoVAE, half the KL": "--objective info_vae --alpha 0.5",
}


def draw(rows: list[dict], source: str) -> None:
    """One line per variant, with a dot for each seed: the use of the latent, and its cost."""
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
            ("Cost", "nats, test mean", (("elbo", BLUE, "o", "ELBO"), ("log_prob", RED, "D", "log p(x)"))),
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
        panels[1].set_xlim(0, 1.04 * units)
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        name = "collapse.png" if source == "digits" else f"collapse_{source}.png"
        path = HERE.parent / "docs" / "pictures" / name
        figure.savefig(path, metadata={"Software": None})
        print(f"picture: {path}")


STUDY = Study(
    "collapse",
    VARIANTS,
    (
        ("mutual information, nats", "mutual_information", "{:.2f}"), ("KL, nats", "kl", "{:.2f}"),
        ("active units", "active_units", "{:.1f}"), ("ELBO, nats", "elbo", "{:.2f}"),
        ("log p(x), nats", "log_prob", "{:.2f}"),
    ),
    common="--model autoregressive",
    evaluation=0,  # one seed for all runs, so that their binarised data are equal
    draw=draw,
)  # fmt: skip

if __name__ == "__main__":
    STUDY.main(__doc__)
