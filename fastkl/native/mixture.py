"""Arguments of mixture.c: mixtures of diagonal Gaussians."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fastkl.native._pack import DOUBLE, KINDS, Plan, function, keep, known, plans

FORMS = {"point": 0, "expected": 1, "convolved": 2}
# Elements of the means of a slice of shared components: with their scales and sums of gradients they stay in the cache.
SLICE = 1 << 15
LANES = 16  # at most, in mixture.c
# Beyond this many dimensions vectors of components would take too much memory; beyond this many elements, the
# components of one datum.
MOST_COLUMNS, MOST_OWN = 1 << 14, 1 << 20
MOST_KEPT = 1 << 21  # responsibilities that gmm_moments stores between its two passes


def _step(count: int, columns: int) -> int:
    """Components of a slice: whole vectors, in slices of about equal length."""
    most = max(1, SLICE // columns)
    if count <= most:
        return count
    each = -(-count // -(-count // most))
    return -(-each // LANES) * LANES


def _kind(tensor: Tensor | None, kinds: dict) -> int:
    return 0 if tensor is None else kinds[tensor.dtype]


def _make(name: str, form: str, rows: tuple, weights: tuple, components: tuple, dlogvars: Tensor | None) -> Plan | None:
    """The plan for the tensors [R, D] (or [R], in place 2), [I, K] and [M, K, D], None for a missing one."""
    z, logits, means = rows[0], weights[0], components[0]
    tensors = (*rows, *weights, *components, dlogvars)
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    kinds, wide = (DOUBLE, torch.float64) if torch.float64 in dtypes else (KINDS, torch.float32)
    (count, columns), own = means.shape[1:], means.shape[0] > 1
    if not kinds.keys() >= dtypes or columns > MOST_COLUMNS or (own and count * columns > MOST_OWN):
        return None
    found = function("mixture", name, wide)
    if found is None:
        return None
    numbers = [FORMS[form], count if own else _step(count, columns), 2, 1, *z.shape]
    for tensor in rows:
        stride = (0, 0) if tensor is None else (*tensor.stride(), 0)[:2]
        numbers += (_kind(tensor, kinds), *stride)
    numbers += (2, 1, *logits.shape)
    for tensor in weights:
        numbers += (_kind(tensor, kinds), *((0, 0) if tensor is None else tensor.stride()))
    numbers += (3, 1, *means.shape)
    for tensor in components:
        stride = (0,) * 3 if tensor is None else tensor.expand(means.shape).stride()
        numbers += (_kind(tensor, kinds), *stride)
    sizes, stride = ((1,) * 3, (0,) * 3) if dlogvars is None else (dlogvars.shape, dlogvars.stride())
    numbers += (3, 1, *sizes, _kind(dlogvars, kinds), *stride)
    pack = struct.Struct(f"{4 + len(tensors)}q").pack
    return Plan(found, struct.pack(f"{len(numbers)}q", *numbers), pack, dtype=wide)


def _run(name: str, form: str, rows, weights, components, dlogvars, results):
    """Run the C function and return results(dtype), or NotImplemented. These are ln p, ln p as double and the
    responsibilities; each may be None."""
    key = ("mixture", name, form, *known((*rows, *weights, *components, dlogvars)))
    try:
        plan = plans[key]
    except KeyError:
        plan = keep(key, _make(name, form, rows, weights, components, dlogvars))
    if plan is None:
        return NotImplemented
    made = results(plan.dtype)
    if rows[0].shape[0]:
        plan.run(*made, *rows, *weights, *components, dlogvars)
    return made


def gmm_log_prob_fwd(z, logvar, logits, means, logvars, scale_tril, form: str, precision: str, kept: int):
    """[ln p, ln p in float64, responsibilities [R, K]], the first 1 + kept of them; or NotImplemented. Every precision
    is exact."""
    if scale_tril is not None:
        return NotImplemented

    def results(dtype: torch.dtype) -> tuple:
        lp = z.new_empty(z.shape[0], dtype=dtype)
        own = z.new_empty((z.shape[0], means.shape[1]), dtype=dtype) if kept == 2 else None
        return lp, torch.empty_like(lp, dtype=torch.float64), own

    rows, weights, components = (z, logvar, None, None, None), (logits, None), (means, logvars, None)
    made = _run("forward", form, rows, weights, components, None, results)
    return made if made is NotImplemented else list(made[: kept + 1])


def gmm_log_prob_bwd(
    dlp, lp, responsibilities, z, logvar, logits, means, logvars, scale_tril,
    dz, dlogvar, dlogits, dmeans, dlogvars, dscale_tril, form: str, precision: str,
):  # fmt: skip
    """Write the outputs that are wanted and return None, or return NotImplemented."""
    if scale_tril is not None:
        return NotImplemented
    kept = (None, lp, responsibilities)
    outputs, mixture = (dz, dlogvar, dlogits, dmeans, dlogvars), (logits, means, logvars)
    return _gradients("backward", form, kept, (z, logvar, dlp), mixture, outputs)


def _gradients(name: str, form: str, kept: tuple, rows: tuple, mixture: tuple, outputs: tuple):
    """Write the outputs that are wanted and return None, or return NotImplemented. `kept`: of the forward pass."""
    z, (logits, means, logvars) = rows[0], mixture
    dz, dlogvar, dlogits, dmeans, dlogvars = outputs
    of_rows = [dz, dlogvar]
    if means.shape[0] == 1 and _step(*means.shape[1:]) < means.shape[1]:  # each slice of components adds to these
        of_rows = [t.float() if t is not None and t.itemsize == 2 else t for t in of_rows]
    # A saved tensor may come back in any layout.
    kept = tuple(None if tensor is None else tensor.contiguous() for tensor in kept)
    weights, components = (logits, dlogits), (means, logvars, dmeans)
    if _run(name, form, (*rows, *of_rows), weights, components, dlogvars, lambda dtype: kept) is NotImplemented:
        return NotImplemented
    for output, found in zip(outputs, of_rows):
        if found is not output:
            output.copy_(found)
    for output in outputs:
        if output is not None and z.shape[0] == 0:
            output.zero_()
    return None


def gmm_responsibilities_fwd(z, logits, means, logvars, scale_tril, precision: str):
    """ln p(k | z) [R, K], or NotImplemented."""
    if scale_tril is not None:
        return NotImplemented

    def results(dtype: torch.dtype) -> tuple:
        lp = z.new_empty(z.shape[0], dtype=dtype)
        return lp, torch.empty_like(lp, dtype=torch.float64), z.new_empty((z.shape[0], means.shape[1]), dtype=dtype)

    rows, components = (z, None, None, None, None), (means, logvars, None)
    made = _run("log_responsibilities", "point", rows, (logits, None), components, None, results)
    return made if made is NotImplemented else made[2]


def gmm_responsibilities_bwd(
    dlog_r, log_r, z, logits, means, logvars, scale_tril, dz, dlogits, dmeans, dlogvars, dscale_tril, precision: str
):
    """Write the outputs that are wanted and return None, or return NotImplemented."""
    if scale_tril is not None or dlog_r.dtype != log_r.dtype:
        return NotImplemented
    outputs, kept = (dz, None, dlogits, dmeans, dlogvars), (dlog_r, None, log_r)
    name = "log_responsibilities_gradients"
    return _gradients(name, "point", kept, (z, None, None), (logits, means, logvars), outputs)


def gmm_moments_fwd(z, logits, means, logvars, scale_tril):
    """[ln p [R], sum r [K], sum r (z - m) [K, D], sum r (z - m)^2 [K, D]], or NotImplemented."""
    if scale_tril is not None:
        return NotImplemented
    kept = 2 if z.shape[0] * means.shape[1] <= MOST_KEPT else 1
    made = gmm_log_prob_fwd(z, None, logits, means, logvars, None, "point", "exact", kept)
    if made is NotImplemented:
        return NotImplemented
    lp, log_density, *responsibilities = made
    counts, first, second = (like.new_empty(like.shape, dtype=lp.dtype) for like in (logits, means, means))
    found = (None, log_density, responsibilities[0] if responsibilities else None)
    _gradients(
        "moments", "point", found, (z, None, None), (logits, means, logvars), (None, None, counts, first, second)
    )
    return [lp, counts[0], first[0], second[0]]
