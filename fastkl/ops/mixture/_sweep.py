"""Mixtures in torch ops: the sweep over rows and components that every mixture op runs if it has no kernel.

A sweep allocates no tensor of size rows x components x dimensions. Only the tensors that forward keeps for backward
have size rows x components. A sweep goes over slices of components and, for each, over blocks of rows, so on a CPU it
allocates less than 32 MiB for any sizes (a full covariance also needs some matrices of one component). Row r is sample
r // B of datum r % B, where B is the number of data with their own logits or components; tensors are [S, B, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops.mixture._differences import Differences, Full
from fastkl.ops.mixture._expansion import Expansion
from fastkl.ops.mixture._mixture import Mixture, by_datum

# Bytes for a slice of components, and for the responsibilities that forward keeps. Each part chooses its block size.
COMPONENTS_BYTES = 12 << 20
KEPT_BYTES = 10 << 20
# Bytes of a slice's means if rows are compared with each mean by differences: they stay in the cache for all rows.
CACHED_BYTES = 1 << 19
# Data per block if they have their own components and several samples, or matrices.
BLOCK_DATA = 16
# A responsibility below exp of this becomes 0: subnormal numbers are about 30 times slower.
NEGLIGIBLE = {torch.float32: -60.0, torch.float64: -600.0}


def keep_for(rows: Sequence[Tensor | None], mixture: Mixture) -> int:
    """The tensors that forward keeps for backward. 1 is ln p in float64; 2 is also the responsibilities [R, K], on a
    CPU if they fit KEPT_BYTES."""
    z: Any = rows[0]
    size = z.shape[0] * mixture.means.shape[1] * reference.compute_dtype(*rows, *mixture).itemsize
    return 2 if z.device.type == "cpu" and size <= KEPT_BYTES else 1


def _slices(count: int, step: int, first: int = 0) -> list[slice]:
    """range(first, first + count) in slices of about equal length, at most `step`."""
    step = -(-count // -(-count // max(1, step))) if count else 1
    return [slice(start, min(start + step, first + count)) for start in range(first, first + count, step)]


def row_blocks(logits: Tensor) -> tuple[Tensor, ...]:
    """[I, K] in blocks of about a million elements."""
    return logits.split(max(1, (1 << 20) // logits.shape[1]))


Part = Differences | Full | Expansion


class Sweep:
    """The blocks of one call, for z, logvar [R, D] and a mixture in canonical form."""

    def __init__(self, z: Tensor, logvar: Tensor | None, mixture: Mixture, form: str, precision: str) -> None:
        self.mixture, self.form, self.precision = mixture, form, precision
        self.dtype, self.data = reference.compute_dtype(z, logvar, *mixture), mixture.data
        self.z, self.logvar = self.by_datum(z), None if logvar is None else self.by_datum(logvar)
        self.samples = self.z.shape[0]
        self.infinite_rows = z.device.type != "cpu"  # on a CPU log_prob sets it from its result
        self.centre = mixture.means[0].to(self.dtype).mean(0)
        logsumexps = [torch.logsumexp(rows.to(self.dtype), -1) for rows in row_blocks(mixture.logits)]
        self.normaliser = torch.cat(logsumexps)

    def by_datum(self, tensor: Tensor) -> Tensor:
        return by_datum(tensor, self.data)

    def log_weights(self, data: slice, components: slice) -> Tensor:
        """ln pi [1 or B, k]."""
        rows = data if self.mixture.logits.shape[0] > 1 else slice(None)
        return self.mixture.logits[rows, components].to(self.dtype) - self.normaliser[rows].unsqueeze(-1)

    def parts(self) -> Iterator[Part]:
        """The slices of components."""
        data, count, dimensions = self.mixture.means.shape
        if self.mixture.scale_tril is not None:
            size = 8 * self.dtype.itemsize * dimensions * dimensions
            size *= BLOCK_DATA if data > 1 else 1
        else:
            size = 48 * dimensions  # an Expansion's coefficients and sums, with their temporaries
        shared = data == 1 and self.mixture.scale_tril is None and self.form != "convolved"
        for components in _slices(count, COMPONENTS_BYTES // size):
            if shared:
                part = Expansion(self.mixture, components, self.precision, self.centre)
                if part.is_allowed:
                    part.infinite_rows = self.infinite_rows
                    yield part
                    continue
            kind = Differences if self.mixture.scale_tril is None else Full
            step = CACHED_BYTES // (dimensions * self.dtype.itemsize)
            for inner in _slices(components.stop - components.start, step, components.start):
                yield kind(self.mixture, inner, self.form, self.dtype)

    def blocks(self, part: Part) -> Iterator[tuple[slice, slice]]:
        """(samples, data) of about part.rows rows."""
        rows = part.rows
        if self.mixture.means.shape[0] > 1:  # samples of a datum share the results for its components
            rows = min(rows, max(BLOCK_DATA, 0 if self.mixture.scale_tril is not None else rows // self.samples))
        per_sample = min(self.data, rows)
        for data in _slices(self.data, per_sample):
            for samples in _slices(self.samples, part.rows // per_sample):
                yield samples, data

    def prepare(self, part: Part, samples: slice, data: slice, for_gradient: bool = False) -> Any:
        logvar = None if self.logvar is None else self.logvar[samples, data].to(self.dtype)
        return part.prepare(self.z[samples, data].to(self.dtype), logvar, data, for_gradient)

    def joint(self, part: Part, prepared: Any, data: slice) -> Tensor:
        """ln pi_k + ln N [S, B, k] of a block, in float64 if the part needs it."""
        return part.joint(prepared, self.log_weights(data, part.components))

    def weights(self, joint: Tensor, origin: Tensor, out: Tensor | None = None) -> Tensor:
        """exp(joint - origin), at most about 1, in the compute dtype."""
        joint = joint.sub_(origin)
        exponent = joint.to(self.dtype) if out is None else out.copy_(joint)
        return torch.threshold_(exponent, NEGLIGIBLE[self.dtype], float("-inf")).exp_()


def log_prob(sweep: Sweep, keep: int = 0) -> list[Tensor]:
    """[ln p [R]]; with keep >= 1 also ln p in float64, with keep = 2 also the responsibilities [R, K].

    ln p is in float64 because the responsibilities are exp(joint - ln p): for large |ln p|, a float32 rounding error
    would scale all of them by a wrong factor.
    """
    shape = (sweep.samples, sweep.data)
    lp = sweep.z.new_full(shape, float("-inf"), dtype=torch.float64)
    count = sweep.mixture.means.shape[1]
    kept = sweep.z.new_empty((*shape, count), dtype=sweep.dtype) if keep == 2 else None
    complete = False
    for part in sweep.parts():
        complete = (part.components.start, part.components.stop) == (0, count)
        for samples, data in sweep.blocks(part):
            joint = sweep.joint(part, sweep.prepare(part, samples, data), data)
            peak = joint.amax(-1, keepdim=True).double()
            peak = peak.masked_fill_(peak == float("-inf"), 0.0)
            weights = sweep.weights(joint, peak, kept[samples, data] if kept is not None and complete else None)
            total = weights.sum(-1, keepdim=True)
            here = (peak + total.log()).squeeze(-1)
            lp[samples, data] = here if complete else torch.logaddexp(lp[samples, data], here)
            if kept is not None and complete:
                weights /= total
    if not sweep.infinite_rows and lp.isnan().any() and sweep.z.isinf().any():
        sweep.infinite_rows = True
        return log_prob(sweep, keep)
    if kept is not None and not complete:
        fill_responsibilities(sweep, lp, kept)
    results = [lp.flatten().to(sweep.dtype, copy=True), lp.flatten()][: keep + 1]
    return results if kept is None else [*results, kept.flatten(0, 1)]


def fill_responsibilities(sweep: Sweep, lp: Tensor, out: Tensor) -> None:
    """Fill `out` [S, B, K] with exp(joint - ln p)."""
    for part in sweep.parts():
        for samples, data in sweep.blocks(part):
            joint = sweep.joint(part, sweep.prepare(part, samples, data), data)
            sweep.weights(joint, lp[samples, data].unsqueeze(-1), out[samples, data, part.components])


def log_responsibilities(sweep: Sweep) -> Tensor:
    """ln p(k | z) [R, K]."""
    lp, count = None, sweep.mixture.means.shape[1]
    out = sweep.z.new_empty((sweep.samples, sweep.data, count), dtype=sweep.dtype)
    for part in sweep.parts():
        if lp is None and (part.components.start, part.components.stop) != (0, count):
            lp = sweep.by_datum(log_prob(sweep, keep=1)[1]).unsqueeze(-1)
        for samples, data in sweep.blocks(part):
            joint = sweep.joint(part, sweep.prepare(part, samples, data), data)
            log_r = torch.log_softmax(joint, -1) if lp is None else joint - lp[samples, data]
            out[samples, data, part.components] = log_r
    return out.flatten(0, 1)
