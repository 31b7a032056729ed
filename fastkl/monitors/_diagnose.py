"""Warnings of a failing run, derived from its figures."""

from __future__ import annotations

import math

from torch import Tensor

# Thresholds of the warnings.
ACTIVE_PART = 0.1  # share of active latent units
LEAST_KL = 0.1  # nats per datum
USED_PART = 0.2  # share of used components of a mixture
ESS_PART = 0.05  # position of the effective sample size between 1 and L


def diagnose(
    *, kl: float | Tensor | None = None, active_units: int | None = None, latent_units: int | None = None,
    used_components: int | None = None, components: int | None = None,
    effective_sample_size: float | Tensor | None = None, samples: int | None = None, **others: float | Tensor | None,
) -> list[str]:  # fmt: skip
    """One-line warnings of collapse or non-finite figures, each with remedies; an empty list if all figures are good.

    - "posterior collapse": at most a tenth of the latent units are active, or the KL is below 0.1 nats per datum.
    - "mixture collapse": at most a fifth of the components are used, of two or more.
    - "degenerate weights": the effective sample size is below 1 + (L - 1) / 20, of L samples.
    - "not finite": a figure is infinite or NaN.

    Args:
        kl: mean KL per datum, in nats.
        active_units, latent_units: number of active units, from `ActiveUnits`, and of all units.
        used_components, components: number of used components, from `ComponentUsage`, and of all components.
        effective_sample_size, samples: the figure of `EffectiveSampleSize`, and the number L of samples.
        others: further figures to check for finiteness: loss=..., gradient_norm=...

    >>> from fastkl import monitors
    >>> monitors.diagnose(kl=14.2, active_units=17, latent_units=20, loss=98.6)
    []
    >>> print(*monitors.diagnose(kl=0.02, active_units=0, latent_units=20), sep="\\n")
    posterior collapse (0 of 20 latent units active, KL 0.02 nats): free bits, a longer KL warm-up, cyclical beta, or a weaker decoder
    """  # noqa: E501
    given = {"kl": kl, "effective_sample_size": effective_sample_size, **others}
    # Detached, because torch warns if a tensor that requires a gradient is converted to a number.
    figures = {
        name: float(value.detach() if isinstance(value, Tensor) else value)
        for name, value in given.items()
        if value is not None
    }
    kl, size = figures.get("kl"), figures.get("effective_sample_size")
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    lines = []
    if bad:
        remedies = "skip such steps, a smaller learning rate, or bounds on the log-variance"
        lines.append(f"not finite ({', '.join(bad)}): {remedies}")
    signs = []
    if active_units is not None and latent_units and active_units <= ACTIVE_PART * latent_units:
        signs.append(f"{active_units} of {latent_units} latent units active")
    if kl is not None and kl < LEAST_KL:
        signs.append(f"KL {kl:.2g} nats")
    if signs:
        remedies = "free bits, a longer KL warm-up, cyclical beta, or a weaker decoder"
        lines.append(f"posterior collapse ({', '.join(signs)}): {remedies}")
    if (
        used_components is not None
        and components
        and components > 1
        and used_components <= max(1, USED_PART * components)
    ):
        remedies = "a longer warm-up before the mixture, components fitted again, or a higher temperature"
        lines.append(f"mixture collapse ({used_components} of {components} components used): {remedies}")
    if size is not None and samples and samples > 1 and size < 1 + ESS_PART * (samples - 1):
        remedies = "train the encoder longer, a richer posterior, or the plain ELBO, which weights samples equally"
        lines.append(f"degenerate weights (effective sample size {size:.3g} of {samples}): {remedies}")
    return lines
