"""The variance of the gradient of KL(q || mixture): plain, closed-entropy and sticking-the-landing estimators by L.

    python bench/gradient_variance.py [--repeats 2000] [--out docs/pictures/gradient_variance.png]

The mixture has four components in two dimensions; the three posteriors are wide, equal to one component, and narrow.
The variance of d KL / d (mu, logvar) over seeds is summed over its four entries. It falls as 1 / L for each estimator.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch

import fastkl

LOGITS = torch.tensor([0.0, 0.0, 0.5, -0.5], dtype=torch.float64)
MEANS = torch.tensor([[-2.0, -2.0], [2.0, -2.0], [0.0, 2.5], [3.0, 3.0]], dtype=torch.float64)
LOGVARS = torch.tensor([[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [-1.0, -1.0]], dtype=torch.float64)
POSTERIORS = {  # mu, logvar
    "q wide, over three components": ((0.0, 0.0), (1.0, 1.0)),
    "q = one component": ((-2.0, -2.0), (-0.5, -0.5)),
    "q narrow, between components": ((0.0, 0.5), (-3.0, -3.0)),
}
ESTIMATORS = {
    "plain (sampled entropy)": {"entropy": "sampled"},
    "closed entropy": {"entropy": "closed"},
    "sticking the landing": {"entropy": "sampled", "gradient": "stl"},
}
SAMPLES = (1, 2, 4, 8, 16, 32, 64)


def variance(posterior, options, num_samples: int, repeats: int) -> float:
    """The variance over the rows of one batch, which have independent noise."""
    mu, logvar = (torch.tensor(values, dtype=torch.float64).repeat(repeats, 1) for values in posterior)
    leaves = [mu.requires_grad_(), logvar.requires_grad_()]
    kl = fastkl.kl_gmm(*leaves, LOGITS, MEANS, LOGVARS, num_samples=num_samples, seed=0, **options)
    return sum(gradient.var(0).sum().item() for gradient in torch.autograd.grad(kl.sum(), leaves))


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(POSTERIORS), figsize=(12, 4), sharey=True, layout="constrained")
    styles = dict(zip(ESTIMATORS, (("C0", "-", "o", 9), ("C1", "--", "s", 5), ("C2", "-", "^", 6))))
    for axis, posterior in zip(axes, POSTERIORS):
        for estimator, (colour, line, marker, size) in styles.items():
            values = [row["variance"] for row in rows if (row["posterior"], row["estimator"]) == (posterior, estimator)]
            axis.loglog(SAMPLES, values, line, color=colour, marker=marker, markersize=size, label=estimator)
        axis.set(title=posterior, xlabel="samples L", xticks=SAMPLES, xticklabels=SAMPLES)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("variance of d KL / d (mu, logvar)")
    axes[0].legend()
    figure.suptitle("Gradient of KL(q || mixture) by samples; plain and closed entropy are the same gradient")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/gradient_variance.png"))
    options = parser.parse_args()
    rows = []
    for posterior, parameters in POSTERIORS.items():
        for estimator, settings in ESTIMATORS.items():
            for count in SAMPLES:
                value = variance(parameters, settings, count, options.repeats)
                rows.append({"posterior": posterior, "estimator": estimator, "samples": count, "variance": value})
            print(f"{posterior:32s} {estimator:26s} L=1: {rows[-len(SAMPLES)]['variance']:.4g}", flush=True)
    draw(rows, options.out)
    with (Path(__file__).parent / "results" / "gradient_variance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
