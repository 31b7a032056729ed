"""fastkl inside scvi-tools: the KL divergences of its posteriors, and its mixture priors.

    fastkl.integrations.scvi.enable()      # until disable(), or for a block: with scvi.enable():

The models use torch.distributions: `kl_divergence` of two Normals, which they sum, and the density of
`MixtureSameFamily` in `MogPrior`, `VampPrior`, CondSCVI, CytoVI and DestVI. This integration checks that they still do,
and enables `fastkl.integrations.distributions`.
"""

from __future__ import annotations

import importlib
import importlib.metadata

from fastkl.integrations import distributions
from fastkl.integrations._switch import Attribute, Divergence, Layer, Switch, check_method, find

TESTED = "1.4.2"


def changes() -> list[Attribute | Divergence]:
    version = f"scvi-tools {importlib.metadata.version('scvi-tools')} (tested with {TESTED})"
    check_method(find("scvi.module.base", "MogPrior", version), "kl", ("self", "qz", "labels", "kwargs"), version)
    check_method(find("scvi.module.base", "VampPrior", version), "kl", ("self", "qz", "z", "kwargs"), version)
    return distributions.changes()


_switch = Switch(changes)


def enable() -> Layer:
    """Use fastkl in scvi-tools until `disable()`; as a context manager, until the block ends.

    Raises:
        ImportError: scvi-tools is not installed.
        UnsupportedVersion: its priors or torch.distributions have other methods than fastkl expects. Nothing
            was replaced.
    """
    return _switch.enable()


def disable() -> None:
    """Undo the last `enable()` completely."""
    _switch.disable()
