"""Mixture ops without blocks, in differentiable torch ops: for small tensors, and for second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops import _arguments as arguments
from fastkl.ops.mixture._differences import Differences, Full
from fastkl.ops.mixture._mixture import Gradients, Mixture, by_datum, joined

# Up to this product of rows, components and dimensions everything is computed at once: a sweep has more call overhead.
SMALL = 1 << 17


def is_small(z: Tensor, mixture: Mixture) -> bool:
    _, means, _, scale_tril = mixture
    matrices = 0 if scale_tril is None else scale_tril.numel()
    return max(z.shape[0] * means.shape[1] * means.shape[2], matrices) <= SMALL


def prepare(z: Tensor, logvar: Tensor | None, mixture: Mixture, form: str) -> tuple[Differences | Full, Any]:
    """(part, prepared) for all components and rows."""
    dtype = reference.compute_dtype(z, logvar, *mixture)
    part = (Differences if mixture.scale_tril is None else Full)(mixture, arguments.EVERYTHING, form, dtype)
    logvar = None if logvar is None else by_datum(logvar.to(dtype), part.data)
    return part, part.prepare(by_datum(z.to(dtype), part.data), logvar, arguments.EVERYTHING)


def joint_of(part: Differences | Full, prepared: Any) -> Tensor:
    """ln pi_k + the form's term of component k [S, B, K]."""
    return part.joint(prepared, torch.log_softmax(part.mixture.logits.to(part.dtype), -1))


def softmax_of(part: Differences | Full, prepared: Any) -> Tensor:
    """The responsibilities [S, B, K]."""
    return torch.softmax(joint_of(part, prepared), -1)


# (part, prepared) -> the weights [S, B, K] of the components' gradients.
WeightsOf = Callable[[Any, Any], Tensor]


def gradients(weights_of: WeightsOf, z: Tensor, logvar: Tensor | None, mixture: Mixture, form: str) -> Gradients:
    """All of them, in the compute dtype; those of the mixture are still to be summed to its tensors' shapes."""
    part, prepared = prepare(z, logvar, mixture, form)
    weights = weights_of(part, prepared)
    dz, dlogvar, dmeans, dspread = part.gradients(prepared, weights)
    return Gradients(
        joined(dz),
        None if dlogvar is None else joined(dlogvar),
        joined(weights).sum(0, keepdim=True) if mixture.logits.shape[0] == 1 else weights.sum(0),
        dmeans,
        None if mixture.logvars is None else dspread,
        None if mixture.scale_tril is None else dspread,
    )


def differentiable_gradients(
    weights_of: WeightsOf, z: Tensor, logvar: Tensor | None, mixture: Mixture, form: str
) -> list[Any]:
    """`gradients`, with that in the logits themselves, each in its input's shape and dtype."""
    found = gradients(weights_of, z, logvar, mixture, form)
    weights: Any = found.dlogits
    share = torch.softmax(mixture.logits.to(weights.dtype), -1)
    found = found._replace(dlogits=weights - share * weights.sum(-1, keepdim=True))
    return [
        None if gradient is None or tensor is None else gradient.sum_to_size(tensor.shape).to(tensor.dtype)
        for gradient, tensor in zip(found, (z, logvar, *mixture))
    ]
