"""The tensors of a mixture, their gradients, and the parts of the ops' schemas that name them.

Ops and kernels take a mixture in canonical form: rows z [R, D]; logits [I, K]; means [M, K, D]; logvars [m, k, d], each
size full or 1; scale_tril [M, K, D, D]. Row r uses logits[r % I] and means[r % M]; if M > 1, I and m are 1 or M.

`form` is the term of each component at a row z, with q = N(z, diag exp(logvar)): "point" is ln N(z; m, S), "expected"
is E_q[ln N(.; m, S)], "convolved" is ln N(z; m, S + exp(logvar)).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIXTURE = "Tensor logits, Tensor means, Tensor? logvars, Tensor? scale_tril"
# Outputs of a backward op, each in the shape and dtype of its input; None for a gradient that is not wanted.
DMIXTURE = "Tensor(c!)? dlogits, Tensor(d!)? dmeans, Tensor(e!)? dlogvars, Tensor(f!)? dscale_tril"


class Mixture(NamedTuple):
    """The parameters in canonical form; at most one of logvars and scale_tril is given."""

    logits: Tensor
    means: Tensor
    logvars: Tensor | None
    scale_tril: Tensor | None

    @property
    def data(self) -> int:
        """The number of data with their own logits or components."""
        return max(self.logits.shape[0], self.means.shape[0])


class Gradients(NamedTuple):
    """The gradients of a mixture op. None: not wanted, or its tensor is missing.

    While they are summed up, dlogits holds the sum of the weights: the gradient in ln softmax(logits).
    """

    dz: Tensor | None
    dlogvar: Tensor | None
    dlogits: Tensor | None
    dmeans: Tensor | None
    dlogvars: Tensor | None
    dscale_tril: Tensor | None

    @property
    def of_rows(self) -> bool:
        return self.dz is not None or self.dlogvar is not None


def outputs_for(inputs: Sequence[Tensor | None], needed: Iterable[bool]) -> list[Tensor | None]:
    """Outputs of a backward op for those of its inputs whose gradient is needed."""
    return [torch.empty_like(t) if need and t is not None else None for t, need in zip(inputs, needed)]


def part_of(tensor: Any, data: slice, components: slice) -> Tensor:
    """A slice of a parameter or its gradient [M, K, ...], whose sizes of 1 are shared."""
    rows = data if tensor.shape[0] > 1 else slice(None)
    return tensor[rows, components if tensor.shape[1] > 1 else slice(None)]


def by_datum(tensor: Tensor, data: int) -> Tensor:
    """[R, ...] -> [S, B, ...], by reshape, which is_grads_batched supports."""
    return tensor.reshape(-1, data, *tensor.shape[1:])


def joined(tensor: Tensor) -> Tensor:
    """[S, B, ...] -> [R, ...]."""
    return tensor.reshape(-1, *tensor.shape[2:])
