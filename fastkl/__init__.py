"""fastkl: drop-in losses for variational autoencoders."""

from fastkl.ops.kl_normal import kl_normal
from fastkl.ops.rsample_kl import rsample_kl
from fastkl.ops.rsample_normal import rsample_normal
from fastkl.reference import SoftBounds

__version__ = "0.1.0"

__all__ = ["SoftBounds", "kl_normal", "rsample_kl", "rsample_normal"]
