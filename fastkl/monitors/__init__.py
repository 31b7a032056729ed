"""What shows that a model collapses, measured while it trains or over a data set that is never in memory as a whole.

    units = monitors.ActiveUnits()
    for x in loader:
        units.update(encode(x))
    units.count(), monitors.diagnose(active_units=units.count(), latent_units=units.compute().numel())

Every monitor has `update`, which keeps sums in float64 on the device of what it is given and waits for nothing;
`compute`, the figure so far; `reset`; and `merge`, which takes in what another one saw. With `group`, a
torch.distributed process group, `compute` means what all its processes saw and must be called by all of them; None
means this process alone. Nothing is printed, and nothing has a gradient.
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
