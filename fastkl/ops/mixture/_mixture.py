"""Mixtures in torch ops: the sweep over rows and components that every mixture op runs if it has no kernel.

Nothing of size rows x components x dimensions is allocated, and of size rows x components only what forward keeps for
backward. A sweep goes over slices of components and, for each, over blocks of rows, so it allocates less than 32 MiB on
a CPU for any sizes (a full covariance also needs some matrices of one component). Row r is sample r // B of datum
r % B, where B is the number of data with their own logits or components; tensors are [S, B, ...].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkl import reference
from fastkl.ops.mixture._components import Differences, Full, Mixture
from fastkl.ops.mixture._expansion import Expansion

# Bytes for a slice of components, and for the responsibilities that forward keeps. A part chooses its own block size.
COMPONENTS_BYTES = 12 << 20
KEPT_BYTES = 10 << 20
# Bytes of a slice's means if rows are compared with each mean by differences: they stay in the cache for all rows.
CACHED_BYTES = 1 << 19
# Data per block if they have their own components and several samples, or matrices.
BLOCK_DATA = 16
# A responsibility below exp of this becomes 0: subnormal numbers are about 30 times slower.
NEGLIGIBLE = {torch.float32: -60.0, torch.float64: -600.0}


def keep_for(z: Tensor, logits: Tensor, dtype: torch.dtype) -> int:
    """What forward keeps for backward: 1 is ln p in float64, 2 also the responsibilities [R, K] (on a CPU, if they fit
    KEPT_BYTES)."""
    return 2 if z.device.type == "cpu" and z.shape[0] * logits.shape[1] * dtype.itemsize <= KEPT_BYTES else 1


def _slices(count: int, step: int, first: int = 0) -> list[slice]:
    """range(first, first + count) in slices of about equal length, at most `step`."""
    step = -(-count // -(-count // max(1, step))) if count else 1
    return [slice(start, min(start + step, first + count)) for start in range(first, first + count, step)]


def _row_blocks(logits: Tensor) -> tuple[Tensor, ...]:
    """[I, K] in blocks of about a million elements."""
    return logits.split(max(1, (1 << 20) // logits.shape[1]))


def by_datum(tensor: Tensor, data: int) -> Tensor:
    """[R, ...] -> [S, B, ...], by reshape, which is_grads_batched supports."""
    return tensor.reshape(-1, data, *tensor.shape[1:])


class Sweep:
    """The blocks of one call, for z, logvar [R, D] and a mixture in canonical form."""

    def __init__(self, z, logvar, logits, means, logvars, scale_tril, form: str, precision: str):
        self.mixture, self.form, self.precision = Mixture(logits, means, logvars, scale_tril), form, precision
        self.dtype = reference.compute_dtype(z, logvar, logits, means, logvars, scale_tril)
        self.data = max(logits.shape[0], means.shape[0])
        self.z, self.logvar = self.by_datum(z), None if logvar is None else self.by_datum(logvar)
        self.samples = self.z.shape[0]
        self.infinite_rows = z.device.type != "cpu"  # on a CPU log_prob decides it from its result
        self.centre = means[0].to(self.dtype).mean(0)
        self.normaliser = torch.cat([torch.logsumexp(rows.to(self.dtype), -1) for rows in _row_blocks(logits)])

    def by_datum(self, tensor: Tensor) -> Tensor:
        return by_datum(tensor, self.data)

    def log_weights(self, data: slice, components: slice) -> Tensor:
        """ln pi [1 or B, k]."""
        rows = data if self.mixture.logits.shape[0] > 1 else slice(None)
        return self.mixture.logits[rows, components].to(self.dtype) - self.normaliser[rows].unsqueeze(-1)

    def parts(self) -> Iterator:
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

    def blocks(self, part) -> Iterator[tuple[slice, slice]]:
        """(samples, data) of about part.rows rows."""
        rows = part.rows
        if self.mixture.means.shape[0] > 1:  # samples of a datum share what is computed from its components
            rows = min(rows, max(BLOCK_DATA, 0 if self.mixture.scale_tril is not None else rows // self.samples))
        per_sample = min(self.data, rows)
        for data in _slices(self.data, per_sample):
            for samples in _slices(self.samples, part.rows // per_sample):
                yield samples, data

    def prepare(self, part, samples: slice, data: slice, for_gradient: bool = False):
        logvar = None if self.logvar is None else self.logvar[samples, data].to(self.dtype)
        return part.prepare(self.z[samples, data].to(self.dtype), logvar, data, for_gradient)

    def joint(self, part, prepared, data: slice) -> Tensor:
        """ln pi_k + ln N [S, B, k] of a block, in float64 if the part needs it."""
        return part.joint(prepared, self.log_weights(data, part.components))

    def weights(self, joint: Tensor, origin: Tensor, out: Tensor | None = None) -> Tensor:
        """exp(joint - origin), at most about 1, in the compute dtype."""
        joint = joint.sub_(origin)
        exponent = joint.to(self.dtype) if out is None else out.copy_(joint)
        return torch.nn.functional.threshold_(exponent, NEGLIGIBLE[self.dtype], float("-inf")).exp_()


def log_prob(sweep: Sweep, keep: int = 0) -> list[Tensor]:
    """[ln p [R]]; with keep >= 1 also ln p in float64, with keep = 2 also the responsibilities [R, K].

    float64 because the responsibilities are exp(joint - ln p): for large |ln p|, a float32 rounding error would scale
    all of them by a wrong factor.
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
    results = [lp.flatten().to(sweep.dtype, copy=True), lp.flatten(), None if kept is None else kept.flatten(0, 1)]
    return results[: keep + 1]


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


class Weights:
    """The weights of a block: responsibilities, from what log_prob kept, and dlp as their scale."""

    def __init__(self, sweep: Sweep, dlp: Tensor, lp: Tensor, responsibilities: Tensor | None = None):
        self.sweep, self.scale = sweep, sweep.by_datum(dlp.to(sweep.dtype)).unsqueeze(-1)
        self.lp = sweep.by_datum(lp).unsqueeze(-1)
        self.kept = None if responsibilities is None else sweep.by_datum(responsibilities)

    def block(self, part, samples: slice, data: slice) -> tuple:
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
    """Like Weights, for the gradient G of the log-responsibilities: G - exp(log_r) sum_k G."""

    def __init__(self, sweep: Sweep, dlog_r: Tensor, log_r: Tensor):
        self.sweep = sweep
        self.gradient, self.log_r = sweep.by_datum(dlog_r).to(sweep.dtype), sweep.by_datum(log_r)
        self.total = self.gradient.sum(-1, keepdim=True)
        self.scale = (self.gradient != 0).any(-1, keepdim=True).to(sweep.dtype)

    def block(self, part, samples: slice, data: slice) -> tuple:
        prepared = self.sweep.prepare(part, samples, data, for_gradient=True)
        at, total = (samples, data, part.components), self.total[samples, data]
        weights = self.gradient[at] - (self.log_r[at].exp() * total).masked_fill_(total == 0, 0.0)
        return prepared, weights, self.scale[samples, data]


def gradient_buffers(mixture, dtype: torch.dtype) -> list[Tensor]:
    """Zeros to accumulate gradients in; float64 for shared logits, whose gradient is a difference of two large sums."""
    logits, *others = (tensor for tensor in mixture if tensor is not None)
    dtypes = [torch.float64 if len(logits) == 1 else dtype, *[dtype] * len(others)]
    return [torch.zeros(t.shape, dtype=d, device=t.device) for t, d in zip((logits, *others), dtypes)]


def gradients(
    sweep: Sweep, weights: Weights | ResponsibilityWeights, data: bool, buffers: list[Tensor]
) -> list[Tensor]:
    """[dz, dlogvar of q if given] if `data`, in the compute dtype. Gradients of the mixture are added to `buffers`: the
    sum of the weights [I, K], dmeans, and dlogvars or dscale_tril if given."""
    dlogits, *others = buffers or [None]
    parameters, shared = bool(buffers), sweep.mixture.logits.shape[0] == 1
    dz, dlogvar = (
        torch.zeros_like(sweep.z, dtype=sweep.dtype) if wanted else None
        for wanted in (data, data and sweep.logvar is not None)
    )
    for part in sweep.parts():
        part.start(dlogits if shared else None, *others)
        for samples, rows in sweep.blocks(part):
            prepared, block, scale = weights.block(part, samples, rows)
            block = block.to(part.gradient_dtype)
            if data:
                found = part.data_gradient(prepared, block, scale)
                dz[samples, rows] += found[0]
                if dlogvar is not None:
                    dlogvar[samples, rows] += found[1]
            if parameters:
                part.add(prepared, block, scale)
                if not shared:
                    dlogits[rows, part.components] += (block * scale).sum(0)
        if parameters:
            part.finish()
    results = [dz.flatten(0, 1)] if data else []
    if dlogvar is not None:
        results.append(dlogvar.flatten(0, 1))
    return results


def subtract_softmax(dlogits: Tensor, logits: Tensor) -> None:
    """dlogits -= softmax(logits) sum_k dlogits: turns the gradient in ln softmax(logits) into that in the logits."""
    for gradient, rows in zip(_row_blocks(dlogits), _row_blocks(logits)):
        gradient.addcmul_(torch.softmax(rows, -1, dtype=gradient.dtype), gradient.sum(-1, keepdim=True), value=-1)


def moments(sweep: Sweep, keep: int) -> list[Tensor]:
    """[ln p [R], sum r [K], sum r (z - m) [K, D], sum r (z - m)^2 [K, D] or sum r (z - m) (z - m)^T [K, D, D]]."""
    lp, *kept = log_prob(sweep, keep)
    weights = Weights(sweep, torch.ones_like(lp), *kept)
    dlogits, first, *rest = gradient_buffers(sweep.mixture, sweep.dtype)
    second = torch.zeros_like(first) if sweep.mixture.scale_tril is None else rest[0]
    for part in sweep.parts():
        part.start(dlogits, first, second)
        for samples, rows in sweep.blocks(part):
            prepared, block, scale = weights.block(part, samples, rows)
            part.add_moments(prepared, block.to(part.gradient_dtype), scale)
        part.finish_moments()
    return [lp, dlogits[0].to(sweep.dtype), first[0], second[0]]
