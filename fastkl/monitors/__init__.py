"""Monitors of a model's collapse, during training or over a data set that does not fit in memory.

    units = monitors.ActiveUnits()
    for x in loader:
        units.update(encode(x))
    units.count(), monitors.diagnose(active_units=units.count(), latent_units=units.compute().numel())

Every monitor has `update`, which adds to float64 sums on its input's device without a synchronisation; `compute`, the
figure so far; `reset`; and `merge`, which adds another monitor's state. With `group`, a torch.distributed process
group, `compute` is over the data of all its processes, and all of them must call it; None means this process only.
Monitors do not print, and their figures have no gradient.
"""

from fastkl.monitors._diagnose import diagnose
from fastkl.monitors._gradients import gradient_norms
from fastkl.monitors._posterior import ACTIVE, ActiveUnits, KLPerDimension, MutualInformation
from fastkl.monitors._weights import ComponentUsage, EffectiveSampleSize

__all__ = [
    "ACTIVE",
    "ActiveUnits",
    "ComponentUsage",
    "EffectiveSampleSize",
    "KLPerDimension",
    "MutualInformation",
    "diagnose",
    "gradient_norms",
]
