"""fastkl inside Pyro: the KL divergences that `TraceMeanField_ELBO` asks for, and densities of mixtures.

    fastkl.integrations.pyro.enable()      # until disable(), or for a block: with pyro.enable():

Pyro uses torch's distributions and registers its own KL divergences on import. This integration is
`fastkl.integrations.distributions` on top of them: `Delta` and everything else stay Pyro's.
"""

from __future__ import annotations

import importlib

from fastkl.integrations import distributions
from fastkl.integrations._switch import Attribute, Divergence, Switch


def changes(*, mixture_kl: bool = False) -> list[Attribute | Divergence]:
    importlib.import_module("pyro.distributions")  # let it register its divergences now, not over fastkl's later
    return distributions.changes(mixture_kl=mixture_kl)


_switch = Switch(changes)


def enable(*, mixture_kl: bool = False) -> Switch:
    """Use fastkl in Pyro until `disable()`; as a context manager, until the block ends.

    Args:
        mixture_kl: as for `fastkl.integrations.distributions.enable`. `TraceMeanField_ELBO` then estimates the KL of a
            diagonal Normal to a mixture by a draw of its own, where it takes the guide's otherwise.

    Raises:
        ImportError: Pyro is not installed.
        UnsupportedVersion: torch.distributions has other methods than fastkl expects. Nothing was replaced.
    """
    return _switch.enable(mixture_kl=mixture_kl)


def disable() -> None:
    """Undo the last `enable()` completely."""
    _switch.disable()
