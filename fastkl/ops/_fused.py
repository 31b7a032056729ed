"""Small calls inside torch.compile on a CPU, which are compiled as their closed form.

The compiler fuses a closed form with the operations around it, while the call of an op from compiled code runs Python:
the step of a VAE with latents [32, 8] takes 1.4 times as long with the ops. For larger latents the call does not
matter, and the loop in C is faster.
"""

from __future__ import annotations

import torch

MOST_TERMS = 1 << 15  # elements of a latent or a datum, or elements times components of a mixture
MOST_NOISE = 1 << 11  # normals; on a CPU the compiler's own random numbers take 45 ns each, those of the ops 2 ns


def is_fused(device: torch.device, terms: float, most: int = MOST_TERMS) -> bool:
    """Whether a call that computes so many terms is compiled as its closed form."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or device.type != "cpu":
        return False
    return terms <= most  # last, because it adds a guard
