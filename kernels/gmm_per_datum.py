"""Log-density of one mixture per datum: every parameter serves its datum's few samples only, so memory is the bound.

Row r of z is sample r // M of datum r % M. Forward reads the parameters once (2R of [M, K, D]) and backward once, too,
writing their gradients on the way (2R + 2W), if a row fits a tile (D <= 2048; 1024 in float64) and the K components
fit one, or there is one sample; else parameters are read again, for several samples mostly from cache.

Beyond inputs and outputs: log-weights [I, K], one sum [M, K] for logits that all rows share, at most 32 MiB for the
gradient of logvars that broadcast, and for longer rows the joint log-density [R, K] in backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import exp, two_parts
from fastkl.kernels._layout import PROGRAMS, cdiv, compute_dtype, next_power_of_2, share

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
LN_2PI = tl.constexpr(1.8378770664093453)
BUFFER_BYTES = 32 << 20
# Elements of a tile for each thread of a warp of 32, and the longest row that one program holds.
THREAD_TILE = {torch.float32: 8, torch.float64: 4}
LONGEST = {torch.float32: 2048, torch.float64: 1024}


def blocks(data: int, components: int, columns: int, dtype: torch.dtype, form: str) -> dict[str, int]:
    """A tile of (DATA x COMPONENTS) pairs by columns."""
    tile = 128 * THREAD_TILE[dtype]
    if columns % 16:  # many addresses take registers, too
        tile //= 2
    block_columns = next_power_of_2(columns) if columns <= LONGEST[dtype] else tile
    warps = max(4, 4 * block_columns // tile)
    pairs = max(1, tile // block_columns // (2 if columns % 16 and form != "point" else 1))
    block_components = min(next_power_of_2(components), pairs)
    block_data = min(next_power_of_2(data), pairs // block_components)
    return {"DATA": block_data, "COMPONENTS": block_components, "COLUMNS": block_columns, "num_warps": warps}


@triton.jit
def element(difference, logvars, variance, FORM: tl.constexpr):
    """(pull, precision, -2 ln density + constant) of one dimension of one component; pull = precision difference."""
    if FORM == "convolved":
        spread = exp(logvars) + variance
        precision = 1.0 / spread
        pull = difference * precision
        return pull, precision, difference * pull + tl.log(spread)
    root = exp(-0.5 * logvars)
    standard = difference * root
    precision = root * root
    terms = standard * standard + logvars
    if FORM == "expected":
        terms += variance * precision
    return standard * root, precision, terms


@triton.jit
def log_density(log_weight, terms, columns):
    return log_weight - 0.5 * (tl.sum(terms, axis=1) + (tl.zeros_like(log_weight) + columns) * LN_2PI)


@triton.jit
def element_gradient(difference, logvars, variance, pull, precision, FORM: tl.constexpr):
    """In ln S of the component and in logvar of q."""
    if FORM == "convolved":
        half = 0.5 * (pull * pull - precision)
        of_component, of_row = exp(logvars) * half, variance * half
    else:
        scaled = variance * precision
        of_component, of_row = 0.5 * (difference * pull - 1.0), -0.5 * scaled
        if FORM == "expected":
            of_component += 0.5 * scaled
    return of_component, of_row


@triton.jit
def place(first, second, column, strides):
    """Element offsets [pairs, columns] of tensor[first, second, column]; int64, as it may pass 2^31 elements."""
    at = first.to(tl.int64) * strides[0] + second.to(tl.int64) * strides[1]
    return at[:, None] + column.to(tl.int64)[None, :] * strides[2]


@triton.jit
def load_components(means, logvars, datum, component, column, shape, strides, DTYPE: tl.constexpr):
    """Neutral where masked: with z = m = 0, ln S = 0 and sigma = 0 all terms and differences are 0."""
    mask = (component < shape[2])[:, None] & (column < shape[3])[None, :]
    m = tl.load(means + place(datum, component, column, strides[0]), mask, other=0.0).to(DTYPE)
    if logvars is None:
        v = tl.zeros_like(m)
    else:
        v = tl.load(logvars + place(datum, component, column, strides[1]), mask, other=0.0).to(DTYPE)
    return m, v


@triton.jit
def load_rows(z, logvar, sample, datum, column, shape, strides, DTYPE: tl.constexpr):
    """The row once for each of its datum's pairs, z and sigma^2; 0 where masked, see above."""
    mask = (sample >= 0)[:, None] & (column < shape[3])[None, :]
    x = tl.load(z + place(sample, datum, column, strides[2]), mask, other=0.0).to(DTYPE)
    if logvar is None:
        variance = tl.zeros_like(x)
    else:
        variance = exp(tl.load(logvar + place(sample, datum, column, strides[3]), mask, other=float("-inf")).to(DTYPE))
    return x, variance


@triton.jit
def load_log_weights(log_weights, sample, datum, component, shape, strides):
    """A weight of zero where masked."""
    at = (sample % shape[4]).to(tl.int64) * strides[4][0] + datum.to(tl.int64) * strides[4][1]
    return tl.load(log_weights + at + component.to(tl.int64) * strides[4][2], component < shape[2], float("-inf"))


@triton.jit
def finite(peak):
    """A maximum of -inf replaced by 0, so that exponentials of differences to it are 0, not NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def log_sum_exp(peak, total, DATA: tl.constexpr, COMPONENTS: tl.constexpr):
    """[DATA] in float64: each pair's maximum and sum put together."""
    peaks = tl.reshape(peak, [DATA, COMPONENTS])
    top = finite(tl.max(peaks, axis=1))
    together = tl.sum(tl.reshape(total, [DATA, COMPONENTS]) * tl.exp(peaks - top[:, None]), axis=1)
    return top.to(tl.float64) + tl.log(together).to(tl.float64)


@triton.jit
def over_components(values, DATA: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr):
    """[pairs, COLUMNS] summed over each datum's components."""
    return tl.sum(tl.reshape(values, [DATA, COMPONENTS, COLUMNS]), axis=1)


@triton.jit
def gmm_per_datum_fwd_kernel(
    z, logvar, log_weights, means, logvars, lp, joint, shape, strides, samples_per_program,
    FORM: tl.constexpr, RESIDENT: tl.constexpr, DATA: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """DATA mixtures by `samples_per_program` samples of each; RESIDENT: a mixture is one tile, read before the samples.

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
        m, v = load_components(means, logvars, datum, pair % COMPONENTS, column, shape, strides, DTYPE)
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
                    m, v = load_components(means, logvars, datum, component, column, shape, strides, DTYPE)
                x, variance = load_rows(z, logvar, sample, datum, column, shape, strides, DTYPE)
                terms += element(x - m, v, variance, FORM)[2]
            a = load_log_weights(log_weights, sample, datum, component, shape, strides)
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


@triton.jit
def store_parameters(
    dlogits, dmeans, dlogvars, to_logits, to_mean, to_spread, row, component, column, shape, strides,
    EACH_SAMPLE: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    stored = (row < shape[1]) & (component < shape[2])
    mask = stored[:, None] & (column < shape[3])[None, :]
    if not EACH_SAMPLE:  # the same from every block of columns
        tl.store(dlogits + row.to(tl.int64) * strides[8][1] + component.to(tl.int64) * strides[8][2], to_logits, stored)
    tl.store(dmeans + place(row, component, column, strides[9]), to_mean, mask)
    if dlogvars is not None:
        if SUM_COLUMNS:
            at = row.to(tl.int64) * strides[10][0] + component.to(tl.int64) * strides[10][1]
            tl.store(dlogvars + at, tl.sum(tl.where(mask, to_spread, 0.0), axis=1), stored)
        else:
            tl.store(dlogvars + place(row, component, column, strides[10]), to_spread, mask)


@triton.jit
def gmm_per_datum_bwd_kernel(
    dlp, lp, z, logvar, log_weights, means, logvars, joint, dz, dlogvar, dlogits, dmeans, dlogvars, shape, strides,
    samples_per_program, components_per_program,
    FORM: tl.constexpr, ONE_TILE: tl.constexpr, WHOLE: tl.constexpr, EACH_SAMPLE: tl.constexpr,
    SUM_COLUMNS: tl.constexpr, DATA: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """DATA mixtures by some samples, components and columns; dz (and dlogvar) or dmeans (and others) may be None.

    dz needs all components in this program; the parameters' gradients need all samples here, unless there is one only,
    and one tile of components (ONE_TILE). WHOLE: that tile is all of the mixture, and responsibilities are normalised
    in it instead of by lp, whose own rounding they then escape. With `joint` a row has several blocks of columns.
    dlogits is one row per datum, or per sample (EACH_SAMPLE).
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
        m, v = load_components(means, logvars, datum, begin + pair % COMPONENTS, column, shape, strides, DTYPE)
        to_logits = tl.zeros([DATA * COMPONENTS], dtype=DTYPE)
        to_mean = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
        to_spread = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
    for index in range(first, tl.minimum(first + samples_per_program, samples)):
        sample = index + tl.zeros_like(pair)
        at = sample.to(tl.int64) * strides[5][0] + datum.to(tl.int64) * strides[5][1]
        incoming = tl.load(dlp + at).to(DTYPE)
        x, variance = load_rows(z, logvar, sample, datum, column, shape, strides, DTYPE)
        to_z = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
        to_logvar = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
        for start in range(begin, tl.minimum(begin + components_per_program, components), COMPONENTS):
            component = start + pair % COMPONENTS
            if not ONE_TILE:
                m, v = load_components(means, logvars, datum, component, column, shape, strides, DTYPE)
                to_logits = tl.zeros([DATA * COMPONENTS], dtype=DTYPE)
                to_mean = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
                to_spread = tl.zeros([DATA * COMPONENTS, COLUMNS], dtype=DTYPE)
            pull, precision, terms = element(x - m, v, variance, FORM)
            log_weight = load_log_weights(log_weights, sample, datum, component, shape, strides)
            if joint is None:
                a = log_density(log_weight, terms, columns)
            else:
                at = sample.to(tl.int64) * strides[12][0] + datum.to(tl.int64) * strides[12][1] + component
                a = tl.load(joint + at, component < components, other=float("-inf"))  # a weight of zero
            if WHOLE:
                grouped = tl.reshape(a, [DATA, COMPONENTS])
                grouped = tl.exp(grouped - finite(tl.max(grouped, axis=1))[:, None])
                weight = incoming * tl.reshape(grouped / tl.sum(grouped, axis=1)[:, None], [DATA * COMPONENTS])
            else:
                at = sample.to(tl.int64) * strides[11][0] + datum.to(tl.int64) * strides[11][1]
                high, low = two_parts(tl.load(lp + at), DTYPE)
                weight = incoming * tl.exp(a - high - low)
            spread_gradient, logvar_gradient = element_gradient(x - m, v, variance, pull, precision, FORM)
            to_z -= weight[:, None] * pull
            if dlogvar is not None:
                to_logvar += weight[:, None] * logvar_gradient
            if dmeans is not None:
                to_weight = weight - incoming * tl.exp(log_weight)
                if EACH_SAMPLE:
                    at = sample.to(tl.int64) * strides[8][0] + datum.to(tl.int64) * strides[8][1]
                    at += component.to(tl.int64) * strides[8][2]
                    tl.store(dlogits + at, to_weight, (row < data) & (component < components))
                to_logits += to_weight
                to_mean += weight[:, None] * pull
                to_spread += weight[:, None] * spread_gradient
                if not ONE_TILE:
                    store_parameters(
                        dlogits, dmeans, dlogvars, to_logits, to_mean, to_spread, row, component, column, shape,
                        strides, EACH_SAMPLE, SUM_COLUMNS,
                    )  # fmt: skip
        if dz is not None:
            datum_row = block + tl.arange(0, DATA)
            sample = index + tl.zeros_like(datum_row)
            mask = (datum_row < data)[:, None] & (column < columns)[None, :]
            to_z = over_components(to_z, DATA, COMPONENTS, COLUMNS)
            tl.store(dz + place(sample, datum_row, column, strides[6]), to_z, mask)
            if dlogvar is not None:
                to_logvar = over_components(to_logvar, DATA, COMPONENTS, COLUMNS)
                tl.store(dlogvar + place(sample, datum_row, column, strides[7]), to_logvar, mask)
    if ONE_TILE and dmeans is not None:
        store_parameters(
            dlogits, dmeans, dlogvars, to_logits, to_mean, to_spread, row, begin + pair % COMPONENTS, column, shape,
            strides, EACH_SAMPLE, SUM_COLUMNS,
        )  # fmt: skip


def by_sample(tensor, data):
    """[rows, ...] as [samples, data, ...], a view."""
    return None if tensor is None else tensor.unflatten(0, (-1, data))


def strides_of(*tensors):
    return tuple((0, 0, 0) if tensor is None else (*tensor.stride(), 0)[:3] for tensor in tensors)


def canonical(z, logvar, logits, means, logvars, dtype):
    """(z, logvar, log-weights) as [samples, data, ...], means, and logvars expanded to their shape."""
    data, log_weights = len(means), torch.log_softmax(logits, -1, dtype=dtype)
    if len(logits) == 1:
        log_weights = log_weights.expand(data, -1)
    rows = [by_sample(tensor, data) for tensor in (z, logvar, log_weights)]
    return [*rows, means, None if logvars is None else logvars.expand(means.shape)]


def launch_fwd(z, logvar, log_weights, means, logvars, lp, joint, form):
    dtype = log_weights.dtype
    shape = (len(z), *means.shape, len(log_weights))
    block = blocks(*means.shape, dtype, form)
    row_blocks = cdiv(len(means), block["DATA"])
    samples_per_program, groups = share(len(z), 1, PROGRAMS // row_blocks)
    resident = means.shape[1] <= block["COMPONENTS"] and means.shape[2] <= block["COLUMNS"]
    gmm_per_datum_fwd_kernel[(row_blocks * groups,)](
        z, logvar, log_weights, means, logvars, lp, joint, shape, strides_of(means, logvars, z, logvar, log_weights),
        samples_per_program, FORM=form, RESIDENT=resident, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip


def launch_bwd(rows, row_outputs, components, component_outputs, form, *, each_sample, sum_columns, split):
    """rows: dlp, lp, z, logvar, log_weights, joint, each [samples, data, ...]; `split`: a program has one tile of
    components, all samples."""
    dlp, lp, z, logvar, log_weights, joint = rows
    means, logvars = components
    samples, block = len(z), blocks(*means.shape, log_weights.dtype, form)
    row_blocks, column_blocks = cdiv(len(means), block["DATA"]), cdiv(means.shape[2], block["COLUMNS"])
    components_per_program = block["COMPONENTS"] if split else means.shape[1]
    if component_outputs[0] is None:
        samples_per_program, groups = share(samples, 1, PROGRAMS // row_blocks)
    else:
        samples_per_program, groups = samples, 1
    groups *= cdiv(means.shape[1], components_per_program)
    gmm_per_datum_bwd_kernel[(row_blocks * column_blocks * groups,)](
        dlp, lp, z, logvar, log_weights, means, logvars, joint, *row_outputs, *component_outputs,
        (samples, *means.shape, len(log_weights)),
        strides_of(means, logvars, z, logvar, log_weights, dlp, *row_outputs, *component_outputs, lp, joint),
        samples_per_program, components_per_program, FORM=form,
        ONE_TILE=components_per_program <= block["COMPONENTS"], WHOLE=means.shape[1] <= block["COMPONENTS"],
        EACH_SAMPLE=each_sample, SUM_COLUMNS=sum_columns, DTYPE=TRITON_DTYPE[log_weights.dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip


def fwd(z, logvar, logits, means, logvars, scale_tril, form, precision) -> torch.Tensor:
    """log p [R] in float64. Every precision is exact here."""
    dtype = compute_dtype([t for t in (z, logvar, logits, means, logvars) if t is not None])
    if z.numel() == 0:  # without dimensions, the log of a sum of weights that is 1
        return torch.zeros(z.shape[0], dtype=dtype, device=z.device)
    inputs = canonical(z, logvar, logits, means, logvars, dtype)
    lp = torch.empty(z.shape[0], dtype=torch.float64, device=z.device)
    launch_fwd(*inputs, lp, None, form)
    return lp


def bwd(
    dlp, lp, z, logvar, logits, means, logvars, scale_tril, form, precision, data: bool, parameters: bool
) -> list[torch.Tensor]:  # fmt: skip
    row_gradients = [torch.empty_like(t) for t in (z, logvar) if data and t is not None]
    gradients = [torch.empty_like(t) for t in (logits, means, logvars) if parameters and t is not None]
    if z.numel() == 0:
        return [gradient.zero_() for gradient in row_gradients + gradients]
    dtype = compute_dtype([t for t in (z, logvar, logits, means, logvars) if t is not None])
    inputs = canonical(z, logvar, logits, means, logvars, dtype)
    samples, (count, components, columns) = len(inputs[0]), means.shape
    block, joint = blocks(*means.shape, dtype, form), None
    if columns > block["COLUMNS"]:
        joint = torch.empty((samples, count, components), dtype=dtype, device=z.device)
        launch_fwd(*inputs, torch.empty_like(lp), joint, form)
    rows = [by_sample(dlp, count), by_sample(lp, count), *inputs[:3], joint]
    row_outputs = [by_sample(gradient, count) for gradient in row_gradients] + [None] * (2 - len(row_gradients))
    separate = components > block["COMPONENTS"] and samples > 1
    if data and (separate or not parameters):
        settings = dict(each_sample=False, sum_columns=False, split=False)
        launch_bwd(rows, row_outputs, inputs[3:], [None] * 3, form, **settings)
        row_outputs = [None, None]
    if not parameters:
        return row_gradients

    # Logits that several rows share: one row per datum, or per row where neither all nor all samples share them.
    weight_samples = len(inputs[2])
    each_sample = weight_samples > 1
    dlogits = gradients[0]
    direct_logits = len(logits) > 1 and (weight_samples in (1, samples))
    if not direct_logits:
        dlogits = torch.empty((samples if each_sample else 1, count, components), dtype=dtype, device=z.device)
    else:
        dlogits = by_sample(dlogits, count)
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
        dmeans = gradients[1][part]
        if logvars is None:
            dlogvars = None
        elif direct:
            dlogvars = gradients[2]
        else:
            dlogvars = torch.empty((len(dmeans), *full[1:]), dtype=dtype, device=z.device)
        outputs = [dlogits[:, part], dmeans, dlogvars]
        launch_bwd(
            row_part, output_part, [None if t is None else t[part] for t in inputs[3:]], outputs, form,
            each_sample=each_sample, sum_columns=sum_columns, split=separate,
        )  # fmt: skip
        if not direct:
            summed = dlogvars.sum_to_size(1 if len(logvars) == 1 else len(dmeans), *logvars.shape[1:])
            if len(logvars) == 1:
                total = summed if total is None else total + summed
            else:
                gradients[2][part] = summed
    if total is not None:
        gradients[2].copy_(total)
    if not direct_logits:
        gradients[0].copy_(
            dlogits.sum((0, 1), keepdim=True)[0]
            if len(logits) == 1
            else dlogits.unflatten(0, (-1, weight_samples)).sum(0).flatten(0, 1)
        )
    return row_gradients + gradients
