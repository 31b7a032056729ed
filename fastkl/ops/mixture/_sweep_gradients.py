"""Gradients and moments by a sweep over a mixture's rows and components: sums weighted by responsibilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkl.ops.mixture._mixture import Gradients
from fastkl.ops.mixture._sweep import Part, Sweep, log_prob, row_blocks


class DensityWeights:
    """The weights of a block for the log-density: responsibilities, from what log_prob kept, and dlp as their scale."""

    def __init__(self, sweep: Sweep, dlp: Tensor, lp: Tensor, responsibilities: Tensor | None = None) -> None:
        self.sweep, self.scale = sweep, sweep.by_datum(dlp.to(sweep.dtype)).unsqueeze(-1)
        self.lp = sweep.by_datum(lp).unsqueeze(-1)
        self.kept = None if responsibilities is None else sweep.by_datum(responsibilities)

    def block(self, part: Part, samples: slice, data: slice) -> tuple[Any, Tensor, Tensor]:
        """(prepared, weights [S, B, k], scale [S, B, 1]), for the gradients."""
        scale = self.scale[samples, data]
        if self.kept is not None:
            prepared = self.sweep.prepare(part, samples, data, for_gradient=True)
            weights = self.kept[samples, data, part.components]
        else:
            prepared = self.sweep.prepare(part, samples, data)
            weights = self.sweep.weights(self.sweep.joint(part, prepared, data), self.lp[samples, data])
            prepared = part.for_gradient(prepared)
        return prepared, weights.masked_fill(scale == 0, 0.0), scale  # NaN in rows of density 0


class ResponsibilityWeights:
    """Like DensityWeights, for the gradient G of the log-responsibilities: G - exp(log_r) sum_k G."""

    def __init__(self, sweep: Sweep, dlog_r: Tensor, log_r: Tensor) -> None:
        self.sweep = sweep
        self.gradient, self.log_r = sweep.by_datum(dlog_r).to(sweep.dtype), sweep.by_datum(log_r)
        self.total = self.gradient.sum(-1, keepdim=True)
        self.scale = (self.gradient != 0).any(-1, keepdim=True).to(sweep.dtype)

    def block(self, part: Part, samples: slice, data: slice) -> tuple[Any, Tensor, Tensor]:
        prepared = self.sweep.prepare(part, samples, data, for_gradient=True)
        at, total = (samples, data, part.components), self.total[samples, data]
        weights = self.gradient[at] - (self.log_r[at].exp() * total).masked_fill_(total == 0, 0.0)
        return prepared, weights, self.scale[samples, data]


def zeros_to_add_to(wanted: Gradients, dtype: torch.dtype) -> Gradients:
    """Sums for the wanted gradients: the outputs themselves if they have the dtype of the sum, which is `dtype`, or
    float64 for shared logits, whose gradient is a difference of two large sums."""
    wide = wanted.dlogits is not None and len(wanted.dlogits) == 1

    def zeros(output: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if output is None:
            return None
        return output.zero_() if output.dtype == dtype else torch.zeros_like(output, dtype=dtype)

    return Gradients(*(zeros(t, torch.float64 if wide and t is wanted.dlogits else dtype) for t in wanted))


def add_gradients(sweep: Sweep, weights: DensityWeights | ResponsibilityWeights, total: Gradients) -> None:
    """Add the gradients to `total`, which zeros_to_add_to made."""
    dz, dlogvar = (None if t is None else t.unflatten(0, (-1, sweep.data)) for t in total[:2])
    dlogits, dmeans, dlogvars, dscale_tril = total[2:]
    shared = sweep.mixture.logits.shape[0] == 1
    sums = (dlogits if shared else None, dmeans, dlogvars if dscale_tril is None else dscale_tril)
    summed = any(buffer is not None for buffer in sums)
    for part in sweep.parts():
        part.start(*sums)
        for samples, rows in sweep.blocks(part):
            prepared, block, scale = weights.block(part, samples, rows)
            block = block.to(part.gradient_dtype)
            if total.of_rows:
                for output, found in zip((dz, dlogvar), part.data_gradient(prepared, block, scale)):
                    if output is not None:
                        output[samples, rows] += found
            if summed:
                part.add(prepared, block, scale)
            if dlogits is not None and not shared:
                dlogits[rows, part.components] += (block * scale).sum(0)
        if summed:
            part.finish()


def subtract_softmax(dlogits: Tensor, logits: Tensor) -> None:
    """dlogits -= softmax(logits) sum_k dlogits: turns the gradient in ln softmax(logits) into that in the logits."""
    for gradient, rows in zip(row_blocks(dlogits), row_blocks(logits)):
        gradient.addcmul_(torch.softmax(rows, -1, dtype=gradient.dtype), gradient.sum(-1, keepdim=True), value=-1)


def write(outputs: Gradients, found: Gradients, logits: Tensor | None = None) -> None:
    """Write the found gradients to the outputs, summed to their shapes. `logits` turn sums of weights into dlogits."""
    if logits is not None and outputs.dlogits is not None and found.dlogits is not None:
        subtract_softmax(found.dlogits, logits)
    for output, gradient in zip(outputs, found):
        if output is not None and gradient is not None and output is not gradient:
            output.copy_(gradient if gradient.shape == output.shape else gradient.sum_to_size(output.shape))


def moments(sweep: Sweep, keep: int) -> list[Tensor]:
    """[ln p [R], sum r [K], sum r (z - m) [K, D], sum r (z - m)^2 [K, D] or sum r (z - m) (z - m)^T [K, D, D]]."""
    lp, *kept = log_prob(sweep, keep)
    weights = DensityWeights(sweep, torch.ones_like(lp), *kept)
    logits, means, _, scale_tril = sweep.mixture
    counts = torch.zeros_like(logits, dtype=torch.float64)
    first = torch.zeros_like(means, dtype=sweep.dtype)
    second = torch.zeros_like(means if scale_tril is None else scale_tril, dtype=sweep.dtype)
    for part in sweep.parts():
        part.start(counts, first, second)
        for samples, rows in sweep.blocks(part):
            prepared, block, scale = weights.block(part, samples, rows)
            part.add_moments(prepared, block.to(part.gradient_dtype), scale)
        part.finish_moments()
    return [lp, counts[0].to(sweep.dtype), first[0], second[0]]
