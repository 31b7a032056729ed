"""Log-density of a diagonal mixture on tensor cores: the square expanded around a centre c, the mean of the means.

a_k = constant_k - 1/2 [(x^2 + sigma^2) . s^2 - 2 x . (m - c) s^2], x = z - c, s^2 = exp(-logvars): two products by
tl.dot in tf32x3 or tf32. Backward stores the weights w = dlp r of a block of rows (32 MiB), and multiplies them by
rows, dz = w ((m - c) s^2) - x (w s^2), and by components, w^T x and w^T (x^2 + sigma^2), with at most 32 MiB of partial
sums. The exact kernels serve float64 and the convolved form, whose variances differ by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkl.kernels._layout import clear, compute_dtype, finish, places, present
from fastkl.kernels.mixture._products import Products
from fastkl.kernels.mixture.gmm_full import BUFFER_BYTES, add_logits_gradient, blocks_of_rows


def in_float32(z: Tensor, logvar: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Copies of 16-bit rows: unpacking them inside takes registers that the products need."""
    return z.float(), None if logvar is None else logvar.float()


def has_kernel(form: str, *tensors: Tensor | None) -> bool:
    return form != "convolved" and compute_dtype(tensors) == torch.float32


def fwd(
    z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: None,
    form: str, precision: str,
) -> Tensor:  # fmt: skip
    if z.numel() == 0:  # without dimensions, the log of a sum of weights that is 1
        return torch.zeros(len(z), dtype=torch.float32, device=z.device)
    return Products(logits, means, logvars, precision).launch(*in_float32(z, logvar), 0)


def bwd(
    dlp: Tensor, lp: Tensor, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, None],
    outputs: Sequence[Tensor | None], form: str, precision: str,
) -> None:  # fmt: skip
    """Write the outputs, the gradients of gmm_log_prob's inputs; None is not wanted."""
    z, logvar, logits, means, logvars, _ = inputs
    *of_rows, dlogits, dmeans, dlogvars, _ = outputs
    if z.numel() == 0:
        return clear(outputs)
    data, parameters = present(of_rows), present((dlogits, dmeans, dlogvars))
    of_rows = places(of_rows, (z, logvar)) if data else of_rows
    z, logvar = in_float32(z, logvar)
    mixture = Products(logits, means, logvars, precision)
    sums, weight_sum = torch.zeros_like(mixture.log_weights), torch.zeros_like(mixture.constants)
    moments = mixture.means.new_zeros((2, *mixture.means.shape))
    for rows in blocks_of_rows(len(z), len(logits), max(1, BUFFER_BYTES // (4 * mixture.components))):
        x, v, incoming = z[rows], None if logvar is None else logvar[rows], dlp[rows].float()
        weight = torch.empty((len(x), mixture.components), dtype=torch.float32, device=z.device)
        mixture.launch(x, v, rows.start, (incoming, lp[rows], weight))
        if data:
            mixture.launch_by_rows(x, v, weight, *(None if output is None else output[rows] for output in of_rows))
        if parameters:
            weight_sum += weight.sum(0)
            moments += mixture.launch_by_components(x, v, weight)
            add_logits_gradient(sums, weight, incoming[:, None], mixture.log_weights, rows.start)
    if parameters:
        (first, second), mass, m = moments, weight_sum[:, None], mixture.centred
        of_means = mixture.precisions * (first - m * mass)
        of_logvars = 0.5 * (mixture.precisions * (second - 2 * m * first + m * m * mass) - mass)
        of_logvars = None if dlogvars is None else of_logvars.sum_to_size(dlogvars.shape[1:])
        finish((dlogits, dmeans, dlogvars), (sums, of_means, of_logvars))
    return None
