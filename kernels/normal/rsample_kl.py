"""Reparameterised sampling, with or without the KL, in one pass: 2R + 1W forward, 3R + 2W backward (without: 2R + 2W).

The noise comes from Philox in registers. Backward draws it again from the 8-byte seed, so it is never stored.
"""

from __future__ import annotations

import torch

from fastkl.kernels._device import TRITON_DTYPE
from fastkl.kernels._launch import Plan, planned
from fastkl.kernels._layout import (
    OLD_COMPILER,
    PROGRAMS,
    View,
    cdiv,
    clear,
    compute_dtype,
    contiguous,
    expanded,
    finish,
    first_sample,
    is_bounded,
    layout,
    longest_event,
    on_copies,
    present,
    registers,
    share,
    share_rows,
    views,
)
from fastkl.kernels.normal._rsample import blocks, rsample_kl_bwd_kernel, rsample_kl_fwd_kernel


@planned
def plan_fwd(inputs, eps, z, event_ndim, scale, low, high, num_samples, stream, with_kl):
    """(the launch, kl's shape with the splits in front, its dtype); None for views that no two dimensions describe."""
    shape = inputs[0].shape
    inputs = expanded(inputs, shape)
    event_ndim = longest_event(present(inputs)) if event_ndim is None else event_ndim
    noise, noise_step = first_sample(eps, num_samples, inputs[0])
    drawn, drawn_step = first_sample(z, num_samples, inputs[0])
    found = layout([*inputs, noise, drawn], event_ndim, reorder=False)
    if found is None:
        return None
    dtype, block = compute_dtype(inputs), blocks(found.rows, found.columns, present(inputs))
    row_blocks = cdiv(found.rows, block["ROWS"])
    shift = found.columns % 4 != 0
    programs = PROGRAMS // max(1, row_blocks) if with_kl else found.columns
    columns_per_program, splits = share(found.columns + 3 * shift, block["COLUMNS"], programs)
    if not (with_kl or found.columns):
        row_blocks = 0
    plan = Plan(
        rsample_kl_fwd_kernel, (row_blocks * splits,), found.shape, *found.strides, noise_step, drawn_step,
        1 if num_samples is None else num_samples, stream, columns_per_program, splits, low, high,
        SCALE=scale, BOUNDED=is_bounded(low, high), SHIFT=shift, NESTED=found.nested, DTYPE=TRITON_DTYPE[dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, (splits, *shape[: len(shape) - event_ndim]), dtype


def launch_fwd(inputs, eps, seed, event_ndim, scale, low, high, num_samples, stream, *, with_kl):
    """(z, kl), or (z, None). Without a KL event_ndim may be None."""
    mu, parameter = inputs[:2]
    out_dtype = torch.promote_types(mu.dtype, parameter.dtype)
    if num_samples is None:
        z = torch.empty_like(mu, dtype=out_dtype)
    else:
        z = torch.empty((num_samples, *mu.shape), dtype=out_dtype, device=mu.device)
    settings = (event_ndim, scale, low, high, num_samples, stream)
    found = plan_fwd(views(*inputs), *views(eps, z), *settings, with_kl)
    if found is None:
        drawn, kl = launch_fwd(contiguous(*inputs), *contiguous(eps), seed, *settings, with_kl=with_kl)
        return z.copy_(drawn), kl
    plan, shape, dtype = found
    kl = torch.empty(shape[shape[0] == 1 :], dtype=dtype, device=mu.device) if with_kl else None
    plan.launch(*inputs, eps, z, kl, seed)
    return z, kl.sum(0) if with_kl and shape[0] > 1 else kl


def fwd(mu, parameter, prior_mu, prior_logvar, eps, seed, event_ndim, scale, low, high, live, num_samples, stream):
    inputs = (mu, parameter, prior_mu, prior_logvar)
    return launch_fwd(inputs, eps, seed, event_ndim, scale, low, high, num_samples, stream, with_kl=True)


def bwd(
    dz, dkl, mu, parameter, prior_mu, prior_logvar, eps, seed, dmu, dparameter, dprior_mu, dprior_logvar, *settings
) -> None:  # fmt: skip
    if dkl is None:  # not a KL gradient of zero, which would turn an infinite KL into NaN
        prior_mu = prior_logvar = None
    inputs, outputs = (dz, dkl, mu, parameter, prior_mu, prior_logvar, eps), (dmu, dparameter, dprior_mu, dprior_logvar)
    launch_bwd(inputs, outputs, seed, *settings)


@planned
def plan_bwd(inputs, outputs, event_ndim, scale, low, high, live, num_samples, stream):
    """(the launch, the shape of what a shared prior's gradients are summed from, over which dimensions), or None."""
    dz, dkl, *inputs, eps = inputs
    shape, dtype = inputs[0].shape, compute_dtype(inputs)
    shared = outputs[2] is not None and inputs[2].dim() < len(shape)
    inputs, outputs = expanded(inputs, shape), expanded(outputs, shape)
    incoming, incoming_step = first_sample(dz, num_samples, inputs[0])
    noise, noise_step = first_sample(eps, num_samples, inputs[0])
    event_ndim = longest_event([*present(inputs), incoming]) if event_ndim is None else event_ndim
    event = shape[len(shape) - event_ndim :]
    rows, columns = shape[: len(shape) - event_ndim].numel(), event.numel()
    block = blocks(rows, columns, present(inputs))
    shift = columns % 4 != 0
    if dtype == torch.float32 and ((num_samples or 1) > 1 or OLD_COMPILER):  # fewer would spill in bfloat16
        block |= registers(168)
    column_blocks = cdiv(columns + 3 * shift, block["COLUMNS"])
    partial, over, rows_per_program, groups = None, None, block["ROWS"], cdiv(rows, block["ROWS"])
    if shared and shift:  # shifted rows do not line up in columns, so this gradient is written whole first
        partial, over = (2, *shape), tuple(range(1, 1 + len(shape) - event_ndim))
        outputs[2:] = [View.dense(shape, dtype)] * 2
    elif shared:
        rows_per_program, groups = share_rows(rows, block["ROWS"], column_blocks)
        partial, over = (2, groups, *event), (1,)
        outputs[2:] = [View.dense(event, dtype).expand(shape)] * 2
    of_kl = first_sample(None, None, inputs[0])[0] if dkl is None else dkl.of_rows(shape)
    found = layout([incoming, of_kl, *inputs, noise, *outputs], event_ndim, reorder=False)
    if found is None:
        return None
    plan = Plan(
        rsample_kl_bwd_kernel, (groups * column_blocks,), found.shape, *found.strides,
        noise_step, incoming_step, 1 if num_samples is None else num_samples, stream, rows_per_program, column_blocks,
        columns, low, high, SCALE=scale, BOUNDED=is_bounded(low, high), LIVE=live, SHARED=shared and not shift,
        SHIFT=shift, NESTED=found.nested, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    return plan, partial, over


def launch_bwd(inputs, outputs, seed, *settings) -> None:
    """The gradients `outputs` of q and, if they are not None, of the prior. inputs: dz, dkl with one value for each row
    (each may be None), those of the forward pass, and eps. Without a KL event_ndim, the first setting, may be None."""
    dz, dkl, mu, parameter, prior_mu, prior_logvar, eps = inputs
    if mu.numel() == 0:
        return clear(outputs)
    dtype = compute_dtype((mu, parameter, prior_mu, prior_logvar))
    dkl = None if dkl is None else dkl.to(dtype)
    inputs = (dz, dkl, *inputs[2:])
    found = plan_bwd(views(*inputs), views(*outputs), *settings)
    if found is None:
        return on_copies(lambda *copies: launch_bwd(*copies, seed, *settings), inputs, outputs)
    plan, shape, over = found
    totals = outputs[2:] if shape is None else torch.empty(shape, dtype=dtype, device=mu.device)
    plan.launch(
        mu.new_zeros(()) if dz is None else dz, dkl, None if dkl is None else mu, parameter, prior_mu, prior_logvar,
        eps, *outputs[:2], *totals, seed,
    )  # fmt: skip
    return None if shape is None else finish(outputs[2:], totals.sum(over))
