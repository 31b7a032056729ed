"""Gradients of the ops on a mixture that all rows share, as moments weighted by responsibilities.

Two deterministic kernels: by rows, for z, its log-variance and logits of its own; by components, for the parameters.
Each takes the distances of a tile anew, then goes through the dimensions a second time; where many programs share a
sum they write partial ones, of at most PARTIAL_BYTES all together, which are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._device import exp, two_parts
from fastkl.kernels._layout import cdiv, compute_dtype
from fastkl.kernels._mixture import (
    STEP,
    TRITON_DTYPE,
    blocks,
    by_component,
    by_row,
    four,
    joint_tile,
    load_centred,
    load_rows,
    prepare,
    split,
    together,
)

FINISH = {"COMPONENTS": 32, "COLUMNS": 32}


@triton.jit
def given_weights(
    dlog_r, log_r, total, row, component, components, strides, BY_ROWS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """dlog_r - exp(log_r) total, 0 beyond the last component."""
    mask = by_component(component < components, BY_ROWS)
    rows, columns = by_row(row.to(tl.int64), BY_ROWS), by_component(component.to(tl.int64), BY_ROWS)
    gradient = tl.load(dlog_r + rows * strides[0] + columns * strides[1], mask, other=0.0).to(DTYPE)
    value = tl.load(log_r + rows * components + columns, mask, other=float("-inf")).to(DTYPE)
    return gradient - exp(value) * by_row(total, BY_ROWS)


@triton.jit
def gmm_rows_kernel(
    dlp, lp, dlog_r, log_r, z, logvar, logits, normaliser, centre, constants, roots, scaled_means, dz, dlogvar, dlogits,
    rows, copies, shape, strides, split_strides, components_per_program, splits,
    FORM: tl.constexpr, GIVEN: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients of z and logvar (per split), and of logits where each row has its own.

    `rows` rows of logits, each for `copies` rows of z, `rows` apart. The sums over components and copies are kept in
    the outputs, whose elements belong to one program. With GIVEN the weights are dlog_r - exp(log_r) dlp.
    """
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    valid = index < rows
    index = tl.minimum(index, rows - 1)  # beyond the last row it again, not stored
    quad = tl.arange(0, 4).to(tl.int64)[None, :]
    steps = (strides[0][1] * 4, strides[1][1] * 4)
    first = split * components_per_program
    if dz is not None:
        dz += split.to(tl.int64) * split_strides[0]
    if dlogvar is not None:
        dlogvar += split.to(tl.int64) * split_strides[1]
    if dlogits is not None:
        normal = tl.load(normaliser + index)
    for copy in range(copies):
        row = index.to(tl.int64) + copy * rows
        z_at = z + row[:, None] * strides[0][0] + quad * strides[0][1]
        logvar_at = None
        if logvar is not None:
            logvar_at = logvar + row[:, None] * strides[1][0] + quad * strides[1][1]
        gradient = tl.load(dlp + row * strides[3]).to(DTYPE)
        if not GIVEN:
            value, rest = two_parts(tl.load(lp + row), DTYPE)
        for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
            component = start + tl.arange(0, COMPONENTS)
            if GIVEN:
                weight = given_weights(dlog_r, log_r, gradient, row, component, shape[1], strides[4], True, DTYPE)
            else:
                joint = joint_tile(
                    z_at, logvar_at, logits, normaliser, centre, constants, roots, scaled_means, index, start, shape,
                    steps, strides[2], FORM, TAIL, True, ROWS, COMPONENTS, DTYPE,
                )  # fmt: skip
                weight = gradient[None, :] * exp(joint - value[None, :] - rest[None, :])
            if dlogits is not None:
                inside = (component < shape[1])[:, None] & valid[None, :]
                column = tl.minimum(component, shape[1] - 1).to(tl.int64)[:, None]  # the last one again, not stored
                at = index.to(tl.int64)[None, :] * strides[2][0] + column * strides[2][1]
                out = index.to(tl.int64)[None, :] * strides[7][0] + column * strides[7][1]
                change = weight
                if not GIVEN:
                    share = tl.load(logits + at).to(DTYPE) - normal[None, :]
                    change -= gradient[None, :] * exp(share)
                again = (copy + tl.arange(0, 1) > 0)[:, None]  # else 0: nothing yet
                change += tl.load(dlogits + out, again, other=0.0).to(DTYPE)
                tl.store(dlogits + out, change, inside)
            if dz is not None:
                dz_at = dz + row[:, None] * strides[5][0] + quad * strides[5][1]
                roots_at, means_at = roots + start, scaled_means + start
                if dlogvar is not None:
                    dlogvar_at = dlogvar + row[:, None] * strides[6][0] + quad * strides[6][1]
                    logvar_here = logvar_at
                z_here = z_at
                for d in range(0, shape[0], 4):
                    zs = four(load_centred(z_here, centre, d, shape[0], FORM, TAIL, DTYPE), ROWS)
                    if FORM != "point":
                        vs = four(exp(load_rows(logvar_here, d, shape[0], TAIL, DTYPE)), ROWS)
                    sums, others = (), ()
                    for i in tl.static_range(4):
                        s = tl.load(roots_at + tl.arange(0, COMPONENTS))[:, None]
                        ms = tl.load(means_at + tl.arange(0, COMPONENTS))[:, None]
                        roots_at += shape[2]
                        means_at += shape[2]
                        if FORM == "convolved":
                            u = 1.0 / (s + vs[i][None, :])
                            t = (zs[i][None, :] - ms) * u
                            others += (tl.sum(weight * (t * t - u), axis=0) * vs[i] * 0.5,)
                            sums += (tl.sum(weight * t, axis=0),)
                        else:
                            t = zs[i][None, :] * s - ms
                            sums += (tl.sum(weight * (t * s), axis=0),)
                            if FORM == "expected":
                                others += (tl.sum(weight * (s * s), axis=0) * vs[i] * -0.5,)
                    mask = valid[:, None]
                    if TAIL:
                        mask = mask & (d + tl.arange(0, 4) < shape[0])[None, :]
                    old = mask & (start + tl.arange(0, 1) > first)[:, None]  # else 0: nothing yet
                    before = tl.load(dz_at, old, other=0.0).to(DTYPE)
                    tl.store(dz_at, before - together(sums[0], sums[1], sums[2], sums[3], ROWS), mask)
                    dz_at += strides[5][1] * 4
                    z_here += steps[0]
                    if dlogvar is not None:
                        before = tl.load(dlogvar_at, old, other=0.0).to(DTYPE)
                        tl.store(dlogvar_at, before + together(others[0], others[1], others[2], others[3], ROWS), mask)
                        dlogvar_at += strides[6][1] * 4
                        logvar_here += steps[1]


@triton.jit
def gmm_components_kernel(
    dlp, lp, dlog_r, log_r, z, logvar, logits, normaliser, centre, constants, roots, scaled_means, counts, sums,
    squared, rows, logit_rows, shape, strides, part_stride, rows_per_program, component_blocks,
    FORM: tl.constexpr, GIVEN: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Per share of the rows: counts [K] = sum w, sums [D, K] = sum w t and squared [D, K] = sum w t^2 (or None), t the
    scaled difference. Convolved: sum w t u and sum w (t^2 u^2 - u), u the precision; expected: sum w (t^2 + q's)."""
    part = tl.program_id(0) // component_blocks
    start_component = tl.program_id(0) % component_blocks * COMPONENTS
    lanes = tl.arange(0, COMPONENTS)
    component = start_component + lanes
    quad = tl.arange(0, 4).to(tl.int64)[None, :]
    steps = (strides[0][1] * 4, strides[1][1] * 4)
    first = part * rows_per_program
    sums_start = sums + part.to(tl.int64) * part_stride + start_component
    if squared is not None:
        squared_start = squared + part.to(tl.int64) * part_stride + start_component
    count = tl.zeros([COMPONENTS], dtype=DTYPE)
    for start in range(first, tl.minimum(first + rows_per_program, rows), ROWS):
        index = start + tl.arange(0, ROWS)
        row = tl.minimum(index, rows - 1).to(tl.int64)  # beyond the last row it again, with no weight
        z_at = z + row[:, None] * strides[0][0] + quad * strides[0][1]
        logvar_at = None
        if logvar is not None:
            logvar_at = logvar + row[:, None] * strides[1][0] + quad * strides[1][1]
        gradient = tl.load(dlp + row * strides[3], mask=index < rows, other=0.0).to(DTYPE)
        if GIVEN:
            weight = given_weights(dlog_r, log_r, gradient, row, component, shape[1], strides[4], False, DTYPE)
            weight = tl.where((index < rows)[:, None], weight, 0.0)
        else:
            value, rest = two_parts(tl.load(lp + row), DTYPE)
            joint = joint_tile(
                z_at, logvar_at, logits, normaliser, centre, constants, roots, scaled_means, row % logit_rows,
                start_component, shape, steps, strides[2], FORM, TAIL, False, ROWS, COMPONENTS, DTYPE,
            )  # fmt: skip
            weight = gradient[:, None] * exp(joint - value[:, None] - rest[:, None])
        count += tl.sum(weight, axis=0)
        roots_at, means_at, sums_at = roots + start_component, scaled_means + start_component, sums_start
        if squared is not None:
            squared_at = squared_start
        for d in range(0, shape[0], 4):
            zs = four(load_centred(z_at, centre, d, shape[0], FORM, TAIL, DTYPE), ROWS)
            z_at += steps[0]
            if FORM != "point":
                vs = four(exp(load_rows(logvar_at, d, shape[0], TAIL, DTYPE)), ROWS)
                logvar_at += steps[1]
            again = start + tl.arange(0, 1) > first  # else 0: nothing yet
            for i in tl.static_range(4):
                s = tl.load(roots_at + lanes)[None, :]
                t = zs[i][:, None]
                if FORM == "convolved":
                    u = 1.0 / (s + vs[i][:, None])
                    t = (t - tl.load(means_at + lanes)[None, :]) * u
                else:
                    t = t * s - tl.load(means_at + lanes)[None, :]
                moment = weight * t
                tl.store(sums_at + lanes, tl.load(sums_at + lanes, again, other=0.0) + tl.sum(moment, axis=0))
                sums_at += shape[2]
                if squared is not None:
                    moment *= t
                    if FORM == "convolved":
                        moment -= weight * u
                    if FORM == "expected":
                        moment += weight * (vs[i][:, None] * (s * s))
                    before = tl.load(squared_at + lanes, again, other=0.0)
                    tl.store(squared_at + lanes, before + tl.sum(moment, axis=0))
                    squared_at += shape[2]
                roots_at += shape[2]
                means_at += shape[2]
    tl.store(counts + part.to(tl.int64) * shape[2] + component, count)


@triton.jit
def gmm_finish_kernel(
    counts, sums, squared, roots, first_out, second_out, count_out, parts, shape, part_stride, column_blocks, strides,
    KIND: tl.constexpr, COMPONENTS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the parts; [K, D] outputs. KIND: "gradient", "convolved" (gradient), or "moments" of the differences."""
    component = tl.program_id(0) // column_blocks * COMPONENTS + tl.arange(0, COMPONENTS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (component < shape[1])[None, :] & (column < shape[0])[:, None]
    at = column.to(tl.int64)[:, None] * shape[2] + component[None, :]
    count = tl.zeros([COMPONENTS], dtype=DTYPE)
    first = tl.zeros([COLUMNS, COMPONENTS], dtype=DTYPE)
    second = tl.zeros([COLUMNS, COMPONENTS], dtype=DTYPE)
    real = component < shape[1]
    for _ in range(parts):
        count += tl.load(counts + component, real, other=0.0)
        first += tl.load(sums + at, mask, other=0.0)
        counts += shape[2]
        sums += part_stride
        if squared is not None:
            second += tl.load(squared + at, mask, other=0.0)
            squared += part_stride
    s = tl.load(roots + at, mask, other=1.0)  # only to divide by
    if KIND == "gradient":
        first *= s
        second = 0.5 * (second - count[None, :])
    elif KIND == "convolved":
        second *= 0.5 * s
    else:
        first /= s
        second /= s * s
    component, column = component.to(tl.int64), column.to(tl.int64)
    tl.store(first_out + component[None, :] * strides[0][0] + column[:, None] * strides[0][1], first, mask)
    if squared is not None:
        tl.store(second_out + component[None, :] * strides[1][0] + column[:, None] * strides[1][1], second, mask)
    if tl.program_id(0) % column_blocks == 0:
        tl.store(count_out + component, count, real)


def row_launch_arguments(given, z, logvar, logits, mixture):
    """(pointers, strides) up to the outputs, for both kernels; logits are None where all rows share them."""
    dlp, _, dlog_r, _ = given
    strides = (
        z.stride(), (0, 0) if logvar is None else logvar.stride(), logits.stride(), dlp.stride(0),
        (0, 0) if dlog_r is None else dlog_r.stride(),
    )  # fmt: skip
    pointers = (*given, z, logvar, None if logits.shape[0] == 1 else logits, *mixture)
    return pointers, strides


def by_rows(given, z, logvar, logits, components, mixture, form, *, data, own):
    """(dz, dlogvar, dlogits), each None where it is not wanted: dlogits without its own row for each row of z."""
    rows, columns = z.shape
    logit_rows, dtype = logits.shape[0], mixture.roots.dtype
    owners = logit_rows if logit_rows > 1 else rows
    block = blocks(dtype, form, "rows", owners, components, own=logit_rows > 1, tail=columns % STEP != 0)
    row_blocks = cdiv(owners, block["ROWS"])
    outputs = [torch.empty_like(z), None if logvar is None else torch.empty_like(logvar)] if data else [None, None]
    partial = rows * columns * dtype.itemsize * sum(output is not None for output in outputs)
    length, splits = split(components, block["COMPONENTS"], row_blocks, partial)
    outputs.append(torch.empty_like(logits) if own else None)
    written = list(outputs)
    for i, output in enumerate(outputs):
        # What is added to more than once is added up in the compute dtype.
        again = (splits > 1 or components > block["COMPONENTS"]) if i < 2 else rows > owners
        if output is not None and ((i < 2 and splits > 1) or (again and output.dtype != dtype)):
            shape = (splits, *output.shape) if i < 2 else output.shape
            written[i] = torch.empty(shape, dtype=dtype, device=z.device)
    pointers, strides = row_launch_arguments(given, z, logvar, logits, mixture)
    strides += tuple((0, 0) if w is None else w.stride()[-2:] for w in written)
    split_strides = tuple(w.stride(0) if w is not None and w.dim() == 3 else 0 for w in written[:2])
    if rows:
        gmm_rows_kernel[(row_blocks * splits,)](
            *pointers, *written, owners, rows // owners, (columns, components, mixture.padded), strides, split_strides,
            length, splits, FORM=form, GIVEN=given[2] is not None, TAIL=columns % STEP != 0,
            DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
        )  # fmt: skip
        for output, partials in zip(outputs, written):
            if output is not partials:
                output.copy_(partials.sum(0) if partials.dim() == 3 else partials)
    return outputs


def by_components(given, z, logvar, logits, means, logvars, mixture, form, kind, *, second):
    """(counts [K], first [1, K, D], second or None): gradients in their dtypes and shapes, or moments."""
    rows, columns = z.shape
    components, padded = means.shape[1], mixture.padded
    padded_columns, dtype, device = mixture.roots.shape[0], mixture.roots.dtype, z.device
    own, tail = logits.shape[0] > 1, columns % STEP != 0
    block = blocks(dtype, form, "components", rows, components, own=own, tail=tail)
    component_blocks = cdiv(components, block["COMPONENTS"])
    part = padded_columns * padded
    partial = part * (1 + second) * dtype.itemsize
    length, parts = split(rows, block["ROWS"], component_blocks, partial, z.numel() * z.itemsize)
    counts = torch.empty((parts, padded), dtype=dtype, device=device)
    sums = torch.empty((1 + second, parts, padded_columns, padded), dtype=dtype, device=device)
    pointers, strides = row_launch_arguments(given, z, logvar, logits, mixture)
    shape = (columns, components, padded)
    gmm_components_kernel[(component_blocks * parts,)](
        *pointers, counts, sums[0], sums[1] if second else None, rows, logits.shape[0], shape, strides, part, length,
        component_blocks, FORM=form, GIVEN=given[2] is not None, TAIL=columns % STEP != 0, DTYPE=TRITON_DTYPE[dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    moments = kind == "moments"
    count_out = torch.empty(components, dtype=dtype, device=device)
    first_out = torch.empty(means.shape, dtype=dtype, device=device) if moments else torch.empty_like(means)
    second_out = None
    if second:  # broadcast logvars: summed afterwards
        whole = not moments and logvars is not None and logvars.shape == means.shape
        second_out = torch.empty_like(logvars) if whole else torch.empty(means.shape, dtype=dtype, device=device)
    column_blocks = max(1, cdiv(columns, FINISH["COLUMNS"]))
    gmm_finish_kernel[(cdiv(components, FINISH["COMPONENTS"]) * column_blocks,)](
        counts, sums[0], sums[1] if second else None, mixture.roots, first_out, second_out, count_out, parts, shape,
        part, column_blocks, (first_out.stride()[1:], second_out.stride()[1:] if second else (0, 0)),
        KIND=kind, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **FINISH,
    )  # fmt: skip
    if second and not moments and not whole:
        total = second_out
        for dim in (1, 2):
            if logvars.shape[dim] == 1:
                total = total.sum(dim, keepdim=True)
        second_out = torch.empty_like(logvars).copy_(total)
    return count_out, first_out, second_out


def gradients(given, z, logvar, logits, means, logvars, form, data, parameters):
    """What bwd returns; `given` is (dlp, lp, dlog_r, log_r), of which the first are also the sums of the third."""
    dtype = compute_dtype([t for t in (z, logvar, logits, means, logvars) if t is not None])
    if z.shape[0] == 0:
        out = ([z, logvar] if data else []) + ([logits, means, logvars] if parameters else [])
        return [torch.zeros_like(tensor) for tensor in out if tensor is not None]
    mixture = prepare(logits, means, logvars, form, dtype)
    own = logits.shape[0] > 1
    out, dlogits = [], None
    if data or (parameters and own):
        *out, dlogits = by_rows(
            given, z, logvar, logits, means.shape[1], mixture, form, data=data, own=own and parameters
        )  # fmt: skip
    if parameters:
        kind = "convolved" if form == "convolved" else "gradient"
        counts, dmeans, dlogvars = by_components(
            given, z, logvar, logits, means, logvars, mixture, form, kind, second=logvars is not None
        )  # fmt: skip
        if not own:
            if given[2] is None:
                counts -= torch.softmax(logits[0].to(dtype), 0) * given[0].sum(dtype=dtype)
            dlogits = torch.empty_like(logits).copy_(counts)
        out += [dlogits, dmeans, dlogvars]
    return [tensor for tensor in out if tensor is not None]
