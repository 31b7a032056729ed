"""fastkl inside Pyro: the KL divergences that `TraceMeanField_ELBO` asks for, and densities of mixtures.

    fastkl.integrations.pyro.enable()      # until disable(), or for a block: with pyro.enable():

Pyro uses torch's distributions and registers its own KL divergences on import. This integration is
`fastkl.integrations.distributions` on top of them: `Delta` and everything else stay Pyro's.
"""

from __future__ import annotations

import importlib

from torch.distributions import MixtureSameFamily

from fastkl.integrations import distributions
from fastkl.integrations._switch import Attribute, Divergence, Layer, Switch, UnsupportedVersion, find

TESTED = "1.9.2"


def changes(*, mixture_kl: bool = False) -> list[Attribute | Divergence]:
    # Imported first, so that Pyro registers its divergences below fastkl's.
    version = f"Pyro {importlib.import_module('pyro').__version__} (tested with {TESTED})"
    mixture = find("pyro.distributions", "MixtureSameFamily", version)
    if mixture.log_prob is not MixtureSameFamily.log_prob:
        raise UnsupportedVersion(
            f"MixtureSameFamily has a log_prob of its own in {version}, which is not supported; nothing was replaced"
        )
    return distributions.changes(mixture_kl=mixture_kl)


_switch = Switch(changes)


def enable(*, mixture_kl: bool = False) -> Layer:
    """Use fastkl in Pyro until `disable()`; as a context manager, until the block ends.

    Args:
        mixture_kl: as for `fastkl.integrations.distributions.enable`. `TraceMeanField_ELBO` then estimates the KL of a
            diagonal Normal to a mixture by a separate draw instead of the guide's.

    Raises:
        ImportError: Pyro is not installed.
        UnsupportedVersion: mixtures have a density of Pyro's own, or torch.distributions has other methods than fastkl
            expects. Nothing was replaced.
    """
    return _switch.enable(mixture_kl=mixture_kl)


def disable() -> None:
    """Undo the last `enable()` completely."""
    _switch.disable()
