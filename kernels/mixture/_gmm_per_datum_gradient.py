"""Gradients of the log-density of one mixture per datum, for rows and parameters in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE, finite, proportion, two_parts, weighted
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import PROGRAMS, cdiv, share
from fastkl.kernels.mixture._gmm_per_datum import (
    blocks,
    element,
    element_gradient,
    load_components,
    load_log_weights,
    load_rows,
    log_density,
    place,
    strides_of,
)


@triton.jit
def over_components(values, DATA: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr):
    """[pairs, COLUMNS] summed over each datum's components."""
    return tl.sum(tl.reshape(values, [DATA, COMPONENTS, COLUMNS]), axis=1)


@triton.jit
def store_parameters(
    dlogits, dmeans, dlogvars, to_logits, to_mean, to_spread, row, component, column, shape,
    dlogits_strides, dmeans_strides, dlogvars_strides, EACH_SAMPLE: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    stored = (row < shape[1]) & (component < shape[2])
    mask = stored[:, None] & (column < shape[3])[None, :]
    if not EACH_SAMPLE:  # every block of columns stores the same value
        at = row.to(tl.int64) * dlogits_strides[1] + component.to(tl.int64) * dlogits_strides[2]
        tl.store(dlogits + at, to_logits, stored)
    tl.store(dmeans + place(row, component, column, dmeans_strides), to_mean, mask)
    if dlogvars is not None:
        if SUM_COLUMNS:
            at = row.to(tl.int64) * dlogvars_strides[0] + component.to(tl.int64) * dlogvars_strides[1]
            tl.store(dlogvars + at, tl.sum(tl.where(mask, to_spread, 0.0), axis=1), stored)
        else:
            tl.store(dlogvars + place(row, component, column, dlogvars_strides), to_spread, mask)


@triton.jit
def gmm_per_datum_bwd_kernel(
    dlp, lp, z, logvar, log_weights, means, logvars, joint, dz, dlogvar, dlogits, dmeans, dlogvars, shape,
    dlp_strides, lp_strides, z_strides, logvar_strides, log_weights_strides, means_strides, logvars_strides,
    joint_strides, dz_strides, dlogvar_strides, dlogits_strides, dmeans_strides, dlogvars_strides,
    samples_per_program, components_per_program,
    FORM: tl.constexpr, ONE_TILE: tl.constexpr, WHOLE: tl.constexpr, EACH_SAMPLE: tl.constexpr,
    SUM_COLUMNS: tl.constexpr, DATA: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """DATA mixtures by some samples, components and columns; dz (and dlogvar) or dmeans (and others) may be None.

    dz needs all components in one program. The parameters' gradients need all samples in one program and, unless there
    is only one sample, one tile of components (ONE_TILE). WHOLE: the tile holds the whole mixture, so responsibilities
    are normalised in it, which avoids the rounding of lp. With `joint` a row has several blocks of columns. dlogits has
    one row per datum, or per sample (EACH_SAMPLE).
    """
    samples, data, components, columns = shape[0], shape[1], shape[2], shape[3]
    row_blocks, column_blocks = tl.cdiv(data, DATA), tl.cdiv(columns, COLUMNS)
    block = tl.program_id(0) % row_blocks * DATA
    rest = tl.program_id(0) // row_blocks
    column = rest % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    groups = tl.cdiv(components, components_per_program)
    begin = rest // column_blocks % groups * components_per_program
    first = rest // column_blocks // groups * samples_per_program
    pair = tl.arange(0, DATA * COMPONENTS)
    row = block + pair // COMPONENTS
    datum = tl.minimum(row, data - 1)
    if ONE_TILE:
        m, v = load_components(
            means, logvars, datum, begin + pair % COMPONENTS, column, shape, means_strides, logvars_strides, DTYPE
        )
        to_logits = tl.zeros([DATA * COMPONENTS], dtype=DTYPE)
        to_mean = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
        to_spread = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
    for index in range(first, tl.minimum(first + samples_per_program, samples)):
        sample = index + tl.zeros_like(pair)
        at = sample.to(tl.int64) * dlp_strides[0] + datum.to(tl.int64) * dlp_strides[1]
        incoming = tl.load(dlp + at).to(DTYPE)
        x, variance = load_rows(z, logvar, sample, datum, column, shape, z_strides, logvar_strides, DTYPE)
        to_z = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
        to_logvar = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
        for start in range(begin, tl.minimum(begin + components_per_program, components), COMPONENTS):
            component = start + pair % COMPONENTS
            if not ONE_TILE:
                m, v = load_components(
                    means, logvars, datum, component, column, shape, means_strides, logvars_strides, DTYPE
                )
                to_logits = tl.zeros([DATA * COMPONENTS], dtype=DTYPE)
                to_mean = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
                to_spread = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
            pull, precision, terms = element(x - m, v, variance, FORM)
            log_weight = load_log_weights(log_weights, sample, datum, component, shape, log_weights_strides)
            if joint is None:
                a = log_density(log_weight, terms, columns)
            else:
                at = sample.to(tl.int64) * joint_strides[0] + datum.to(tl.int64) * joint_strides[1] + component
                a = tl.load(joint + at, component < components, other=float("-inf"))  # a weight of zero
            if WHOLE:
                grouped = tl.reshape(a, [DATA, COMPONENTS])
                grouped = proportion(grouped - finite(tl.max(grouped, axis=1))[:, None])
                grouped /= tl.sum(grouped, axis=1)[:, None]
                weight = weighted(incoming, tl.reshape(grouped, [DATA * COMPONENTS]))
            else:
                at = sample.to(tl.int64) * lp_strides[0] + datum.to(tl.int64) * lp_strides[1]
                high, low = two_parts(tl.load(lp + at), DTYPE)
                weight = weighted(incoming, proportion(a - high - low))
            spread_gradient, logvar_gradient = element_gradient(x - m, v, variance, pull, precision, FORM)
            to_z -= weighted(weight[:, None], pull)
            if dlogvar is not None:
                to_logvar += weighted(weight[:, None], logvar_gradient)
            if dmeans is not None:
                to_weight = weight - incoming * proportion(log_weight)
                if EACH_SAMPLE:
                    at = sample.to(tl.int64) * dlogits_strides[0] + datum.to(tl.int64) * dlogits_strides[1]
                    at += component.to(tl.int64) * dlogits_strides[2]
                    tl.store(dlogits + at, to_weight, (row < data) & (component < components))
                to_logits += to_weight
                to_mean += weighted(weight[:, None], pull)
                to_spread += weighted(weight[:, None], spread_gradient)
                if not ONE_TILE:
                    store_parameters(
                        dlogits, dmeans, dlogvars, to_logits, to_mean, to_spread, row, component, column, shape,
                        dlogits_strides, dmeans_strides, dlogvars_strides, EACH_SAMPLE, SUM_COLUMNS,
                    )  # fmt: skip
        if dz is not None:
            datum_row = block + tl.arange(0, DATA)
            sample = index + tl.zeros_like(datum_row)
            mask = (datum_row < data)[:, None] & (column < columns)[None, :]
            to_z = over_components(to_z, DATA, COMPONENTS, COLUMNS)
            tl.store(dz + place(sample, datum_row, column, dz_strides), to_z, mask)
            if dlogvar is not None:
                to_logvar = over_components(to_logvar, DATA, COMPONENTS, COLUMNS)
                tl.store(dlogvar + place(sample, datum_row, column, dlogvar_strides), to_logvar, mask)
    if ONE_TILE and dmeans is not None:
        store_parameters(
            dlogits, dmeans, dlogvars, to_logits, to_mean, to_spread, row, begin + pair % COMPONENTS, column, shape,
            dlogits_strides, dmeans_strides, dlogvars_strides, EACH_SAMPLE, SUM_COLUMNS,
        )  # fmt: skip


def launch_bwd(
    rows: Sequence[Any], row_outputs: Sequence[Tensor | None], components: tuple[Tensor, Tensor | None],
    component_outputs: Sequence[Tensor | None], form: str, *, each_sample: bool, sum_columns: bool, split: bool,
) -> None:  # fmt: skip
    """rows: dlp, lp, z, logvar, log_weights, joint, each [samples, data, ...]; `split`: a program has one tile of
    components, all samples."""
    dlp, lp, z, logvar, log_weights, joint = rows
    means, logvars = components
    samples, block = len(z), blocks(means.shape, log_weights.dtype, form)
    row_blocks, column_blocks = cdiv(len(means), block["DATA"]), cdiv(means.shape[2], block["COLUMNS"])
    components_per_program = block["COMPONENTS"] if split else means.shape[1]
    if component_outputs[0] is None:
        samples_per_program, groups = share(samples, 1, PROGRAMS // row_blocks)
    else:
        samples_per_program, groups = samples, 1
    groups *= cdiv(means.shape[1], components_per_program)
    tensors = (dlp, lp, z, logvar, log_weights, means, logvars, joint, *row_outputs, *component_outputs)
    launch(
        gmm_per_datum_bwd_kernel, (row_blocks * column_blocks * groups,),
        *tensors, (samples, *means.shape, len(log_weights)), *strides_of(*tensors),
        samples_per_program, components_per_program, FORM=form,
        ONE_TILE=components_per_program <= block["COMPONENTS"], WHOLE=means.shape[1] <= block["COMPONENTS"],
        EACH_SAMPLE=each_sample, SUM_COLUMNS=sum_columns, DTYPE=TRITON_DTYPE[log_weights.dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip
