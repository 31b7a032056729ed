"""Signal-to-noise ratio of the encoder's gradient under the importance-weighted bound: plain, stl and dreg by L.

    python bench/iwae_snr.py [--repeats 400000] [--out docs/pictures/iwae_snr.png]

p(z) = N(0, 1) and p(x | z) = N(z, 1), so p(z | x) = N(x / 2, 1/2); q = N(x / 2 + 0.5, 0.6). The signal is the
gradient's mean over independent draws, the noise is its standard deviation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

import fastkl
from fastkl import objectives

X, MU, VARIANCE = 1.0, 1.0, 0.6  # the posterior is N(0.5, 0.5)
ESTIMATORS = {"plain": "plain", "stl": "sticking the landing (biased)", "dreg": "doubly reparameterised"}
PARAMETERS = ("mean", "log-variance")
SAMPLES = (1, 3, 10, 30, 100, 300, 1000)
NUMBERS = 2**16  # numbers per batch, few enough for temporaries to fit the cache


def gradients(estimator: str, num_samples: int, repeats: int, seed: int = 0) -> Tensor:
    """d bound / d (mean, log-variance of q) [repeats, 2], over rows of a batch with independent noise."""
    generator = torch.Generator().manual_seed(seed)
    x, zero = torch.tensor(X, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    blocks = []
    for rows in torch.arange(repeats).split(max(1, NUMBERS // num_samples)):
        leaves = [torch.full((len(rows), 1), value).double().requires_grad_() for value in (MU, math.log(VARIANCE))]
        q = fastkl.DiagonalNormal(*leaves)
        eps = torch.randn(num_samples, len(rows), 1, generator=generator, dtype=torch.float64)

        def log_likelihood(z):
            return fastkl.normal_log_prob(x, z, zero, event_ndim=1)

        settings = {"num_samples": num_samples, "gradient": estimator, "eps": eps}
        loss = objectives.iwae(q, None, log_likelihood, **settings).loss
        blocks.append(-len(rows) * torch.cat(torch.autograd.grad(loss, leaves), 1))
    return torch.cat(blocks)


def slope(samples, ratios) -> float:
    """The slope of ln ratio against ln L, by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (samples, ratios))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def measure(repeats: int) -> list[dict]:
    rows = []
    for estimator in ESTIMATORS:
        # The plain gradient needs more repetitions, because its ratio of signal to noise falls with L.
        count = repeats if estimator == "plain" else max(1000, repeats // 10)
        for num_samples in SAMPLES:
            values = gradients(estimator, num_samples, count)
            for parameter, column in zip(PARAMETERS, values.unbind(1)):
                mean, noise = column.mean().abs().item(), column.std().item()
                ratio = mean / noise
                rows.append({
                    "estimator": estimator, "parameter": parameter, "samples": num_samples, "repeats": count,
                    "mean": column.mean().item(), "standard_deviation": noise, "ratio": ratio,
                    "standard_error_of_ratio": math.sqrt((1 + ratio**2 / 2) / count),
                })  # fmt: skip
            print(f"{estimator:6s} L={num_samples:4d}", *(f"{row['ratio']:.4f}" for row in rows[-2:]), flush=True)
    return rows


def curve(rows: list[dict], estimator: str, parameter: str) -> list[dict]:
    return [row for row in rows if (row["estimator"], row["parameter"]) == (estimator, parameter)]


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastkl.vae.pictures import BLUE, GREY, RED, STYLE

    styles = {"plain": (RED, "o"), "stl": (GREY, "^"), "dreg": (BLUE, "s")}
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6))
        for panel, parameter in zip(figure.subplots(1, 2, sharey=True), PARAMETERS):
            for estimator, (colour, marker) in styles.items():
                points = curve(rows, estimator, parameter)
                ratios = [point["ratio"] for point in points]
                errors = [2 * point["standard_error_of_ratio"] for point in points]
                panel.errorbar(SAMPLES, ratios, errors, color=colour, marker=marker, label=ESTIMATORS[estimator])
            first = curve(rows, "plain", parameter)[2]  # a line through L = 10
            reference = [first["ratio"] * math.sqrt(first["samples"] / samples) for samples in SAMPLES]
            panel.plot(SAMPLES, reference, color="black", linestyle=":", linewidth=1, label="1 / sqrt(L)")
            panel.set(xscale="log", yscale="log", xlabel="importance samples L", title=f"Gradient in q's {parameter}")
        figure.axes[0].set_ylabel("signal to noise, |mean| / standard deviation")
        figure.axes[0].legend(loc="upper left", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=400_000)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/iwae_snr.png"))
    parser.add_argument("--draw", action="store_true", help="only draw the stored results")
    options = parser.parse_args()
    results = Path(__file__).parent / "results" / "iwae_snr.json"
    if options.draw:
        rows = json.loads(results.read_text(encoding="utf-8"))
    else:
        rows = measure(options.repeats)
        results.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    for estimator in ESTIMATORS:
        for parameter in PARAMETERS:
            points = curve(rows, estimator, parameter)
            fitted = slope(SAMPLES[2:], [point["ratio"] for point in points[2:]])
            print(f"{estimator:6s} {parameter:13s} slope from L = {SAMPLES[2]} on: {fitted:+.3f}")
    draw(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
