"""Log-density of one mixture per datum: each parameter serves only its datum's samples, so memory is the bottleneck.

Row r of z is sample r // M of datum r % M. Forward reads the parameters once (2R of [M, K, D]), and backward reads them
once and writes their gradients (2R + 2W), if a row fits a tile (D <= 2048; 1024 in float64) and either the K components
fit one or each datum has one sample. Else parameters are read again, for several samples mostly from cache.

Memory beyond inputs and outputs: log-weights [I, K], one sum [M, K] for logits that all rows share, at most 32 MiB for
the gradient of broadcast logvars, and for longer rows the joint log-density [R, K] in backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE, finite
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import PROGRAMS, cdiv, clear, compute_dtype, place, places, present, share
from fastkl.kernels.mixture._gmm_per_datum import (
    blocks,
    by_sample,
    canonical,
    element,
    load_components,
    load_log_weights,
    load_rows,
    log_density,
    strides_of,
)
from fastkl.kernels.mixture._gmm_per_datum_gradient import launch_bwd

BUFFER_BYTES = 32 << 20  # for the gradient of broadcast logvars


@triton.jit
def log_sum_exp(peak, total, DATA: tl.constexpr, COMPONENTS: tl.constexpr):
    """The log-sum-exp [DATA] in float64, from each pair's maximum and sum."""
    peaks = tl.reshape(peak, [DATA, COMPONENTS])
    top = finite(tl.max(peaks, axis=1))
    together = tl.sum(tl.reshape(total, [DATA, COMPONENTS]) * tl.exp(peaks - top[:, None]), axis=1)
    return top.to(tl.float64) + tl.log(together).to(tl.float64)


@triton.jit
def gmm_per_datum_fwd_kernel(
    z, logvar, log_weights, means, logvars, lp, joint, shape,
    z_strides, logvar_strides, log_weights_strides, means_strides, logvars_strides, samples_per_program,
    FORM: tl.constexpr, RESIDENT: tl.constexpr, DATA: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """DATA mixtures by `samples_per_program` samples of each; RESIDENT: a mixture is one tile, loaded once.

    shape is (samples, data, components, columns, samples of the log-weights). Data past the end repeat the last one
    and are not stored.
    """
    data, components, columns = shape[1], shape[2], shape[3]
    row_blocks = tl.cdiv(data, DATA)
    block = tl.program_id(0) % row_blocks * DATA
    first = tl.program_id(0) // row_blocks * samples_per_program
    pair = tl.arange(0, DATA * COMPONENTS)
    datum = tl.minimum(block + pair // COMPONENTS, data - 1)
    if RESIDENT:
        column = tl.arange(0, COLUMNS)
        m, v = load_components(
            means, logvars, datum, pair % COMPONENTS, column, shape, means_strides, logvars_strides, DTYPE
        )
    for index in range(first, tl.minimum(first + samples_per_program, shape[0])):
        sample = index + tl.zeros_like(pair)
        # Each pair's own maximum and sum over the tiles of components.
        peak = tl.full([DATA * COMPONENTS], float("-inf"), dtype=DTYPE)
        total = tl.zeros([DATA * COMPONENTS], dtype=DTYPE)
        for start in range(0, components, COMPONENTS):
            component = start + pair % COMPONENTS
            terms = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
            for start_column in range(0, columns, COLUMNS):
                column = start_column + tl.arange(0, COLUMNS)
                if not RESIDENT:
                    m, v = load_components(
                        means, logvars, datum, component, column, shape, means_strides, logvars_strides, DTYPE
                    )
                x, variance = load_rows(z, logvar, sample, datum, column, shape, z_strides, logvar_strides, DTYPE)
                terms += element(x - m, v, variance, FORM)[2]
            a = load_log_weights(log_weights, sample, datum, component, shape, log_weights_strides)
            a = log_density(a, terms, columns)
            if joint is not None:
                at = (sample.to(tl.int64) * data + datum) * components + component
                tl.store(joint + at, a, component < components)
            new_peak = tl.maximum(peak, a)
            total = total * tl.exp(peak - finite(new_peak)) + tl.exp(a - finite(new_peak))
            peak = new_peak
        row = block + tl.arange(0, DATA)
        at = (index + tl.zeros_like(row)).to(tl.int64) * data + row
        tl.store(lp + at, log_sum_exp(peak, total, DATA, COMPONENTS), row < data)


def launch_fwd(
    z: Tensor, logvar: Tensor | None, log_weights: Tensor, means: Tensor, logvars: Tensor | None, lp: Tensor,
    joint: Tensor | None, form: str,
) -> None:  # fmt: skip
    dtype = log_weights.dtype
    shape = (len(z), *means.shape, len(log_weights))
    block = blocks(means.shape, dtype, form)
    row_blocks = cdiv(len(means), block["DATA"])
    samples_per_program, groups = share(len(z), 1, PROGRAMS // row_blocks)
    resident = means.shape[1] <= block["COMPONENTS"] and means.shape[2] <= block["COLUMNS"]
    inputs = (z, logvar, log_weights, means, logvars)
    launch(
        gmm_per_datum_fwd_kernel, (row_blocks * groups,), *inputs, lp, joint, shape, *strides_of(*inputs),
        samples_per_program, FORM=form, RESIDENT=resident, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip


def fwd(
    z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: None,
    form: str, precision: str,
) -> Tensor:  # fmt: skip
    """log p [R] in float64. Every precision is exact here."""
    dtype = compute_dtype((z, logvar, logits, means, logvars))
    if z.numel() == 0:  # without dimensions, the log of a sum of weights that is 1
        return torch.zeros(z.shape[0], dtype=dtype, device=z.device)
    inputs = canonical(z, logvar, logits, means, logvars, dtype)
    lp = torch.empty(z.shape[0], dtype=torch.float64, device=z.device)
    launch_fwd(*inputs, lp, None, form)
    return lp


def bwd(
    dlp: Tensor, lp: Tensor, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, None],
    outputs: Sequence[Tensor | None], form: str, precision: str,
) -> None:  # fmt: skip
    """Write the outputs, the gradients of gmm_log_prob's inputs; None is not wanted."""
    z, logvar, logits, means, logvars, _ = inputs
    if z.numel() == 0:
        return clear(outputs)
    dtype = compute_dtype((z, logvar, logits, means, logvars))
    of_rows, parameters = outputs[:2], outputs[2:5]
    data, all_of_mixture = present(of_rows), present(parameters)
    # The kernel writes together what is of rows, and what is of the mixture.
    of_rows = places(of_rows, (z, logvar)) if data else of_rows
    tensors = canonical(z, logvar, logits, means, logvars, dtype)
    samples, (count, components, columns) = len(tensors[0]), means.shape
    block, joint = blocks(means.shape, dtype, form), None
    if columns > block["COLUMNS"]:
        joint = torch.empty((samples, count, components), dtype=dtype, device=z.device)
        launch_fwd(*tensors, torch.empty_like(lp), joint, form)
    rows = [by_sample(dlp, count), by_sample(lp, count), *tensors[:3], joint]
    row_outputs = [by_sample(gradient, count) for gradient in of_rows]
    separate = components > block["COMPONENTS"] and samples > 1
    if data and (separate or not all_of_mixture):
        settings = dict(each_sample=False, sum_columns=False, split=False)
        launch_bwd(rows, row_outputs, tensors[3:], [None] * 3, form, **settings)
        row_outputs = [None, None]
    if not all_of_mixture:
        return None
    dlogits, dmeans = place(parameters[0], logits), place(parameters[1], means)
    dlogvars = None if logvars is None else place(parameters[2], logvars)

    # Logits that several rows share: one row per datum, or per row where neither all nor all samples share them.
    weight_samples = len(tensors[2])
    each_sample = weight_samples > 1
    direct_logits = len(logits) > 1 and (weight_samples in (1, samples))
    if direct_logits:
        of_logits = by_sample(dlogits, count)
    else:
        of_logits = torch.empty((samples if each_sample else 1, count, components), dtype=dtype, device=z.device)
    # Log-variances that broadcast: their gradient for some of the data at a time, in full size, then summed.
    sum_columns = logvars is not None and logvars.shape[2] == 1 < columns <= block["COLUMNS"]
    full = (count, components, 1 if sum_columns else columns)
    direct = logvars is None or logvars.shape == full
    chunk = count if direct else max(1, BUFFER_BYTES // (components * full[2] * dtype.itemsize))
    total = None
    for begin in range(0, count, chunk):
        part = slice(begin, begin + chunk)
        row_part = [None if t is None else t[:, part] for t in rows]
        output_part = [None if t is None else t[:, part] for t in row_outputs]
        wide = None if direct else torch.empty((len(means[part]), *full[1:]), dtype=dtype, device=z.device)
        launch_bwd(
            row_part, output_part, (means[part], None if tensors[4] is None else tensors[4][part]),
            [of_logits[:, part], dmeans[part], dlogvars if wide is None else wide], form,
            each_sample=each_sample, sum_columns=sum_columns, split=separate,
        )  # fmt: skip
        if dlogvars is not None and wide is not None:
            summed = wide.sum_to_size(1 if len(dlogvars) == 1 else len(wide), *dlogvars.shape[1:])
            if len(dlogvars) == 1:
                total = summed if total is None else total + summed
            else:
                dlogvars[part] = summed
    if dlogvars is not None and total is not None:
        dlogvars.copy_(total)
    if not direct_logits:
        dlogits.copy_(
            of_logits.sum((0, 1), keepdim=True)[0]
            if len(logits) == 1
            else of_logits.unflatten(0, (-1, weight_samples)).sum(0).flatten(0, 1)
        )
    return None
