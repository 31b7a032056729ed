"""Reparameterised sampling, with or without the KL, in one pass.

2R + 1W forward, 3R + 2W backward (without the KL 2R + 2W).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE
from fastkl.kernels._launch import Plan, Sums, planned
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
    view,
    views,
)
from fastkl.kernels.normal._rsample import blocks, rsample_kl_bwd_kernel, rsample_kl_fwd_kernel


@planned
def plan_fwd(
    inputs: Sequence[View | None], eps: View | None, z: View, event_ndim: int | None, scale: str, low: float,
    high: float, num_samples: int | None, stream: int, with_kl: bool,
) -> Sums | None:  # fmt: skip
    """(the launch, kl's shape with the splits in front, its dtype); None for views that no two dimensions describe."""
    mu = present(inputs)[0]
    shape = mu.shape
    inputs = expanded(inputs, shape)
    event_ndim = longest_event(present(inputs)) if event_ndim is None else event_ndim
    noise, noise_step = first_sample(eps, num_samples, mu)
    drawn, drawn_step = first_sample(z, num_samples, mu)
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


def launch_fwd(
    inputs: Sequence[Any], eps: Tensor | None, seed: Tensor, event_ndim: int | None, scale: str, low: float,
    high: float, num_samples: int | None, stream: int, *, with_kl: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(z, kl), or (z, None). Without a KL event_ndim may be None."""
    mu, parameter = inputs[:2]
    out_dtype = torch.promote_types(mu.dtype, parameter.dtype)
    if num_samples is None:
        z = torch.empty_like(mu, dtype=out_dtype)
    else:
        z = torch.empty((num_samples, *mu.shape), dtype=out_dtype, device=mu.device)
    settings = (event_ndim, scale, low, high, num_samples, stream)
    noise = None if eps is None else view(eps)
    found = plan_fwd(views(*inputs), noise, view(z), *settings, with_kl)
    if found is None:
        drawn, kl = launch_fwd(contiguous(*inputs), contiguous(eps)[0], seed, *settings, with_kl=with_kl)
        return z.copy_(drawn), kl
    plan, shape, dtype = found
    kl = torch.empty(shape[shape[0] == 1 :], dtype=dtype, device=mu.device) if with_kl else None
    plan.launch(*inputs, eps, z, kl, seed)
    return z, kl if kl is None or shape[0] == 1 else kl.sum(0)


def fwd(
    mu: Tensor, parameter: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    eps: Tensor | None, seed: Tensor, event_ndim: int, scale: str, low: float, high: float, live: bool,
    num_samples: int | None, stream: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    inputs = (mu, parameter, prior_mu, prior_logvar)
    return launch_fwd(inputs, eps, seed, event_ndim, scale, low, high, num_samples, stream, with_kl=True)


def bwd(
    dz: Tensor | None, dkl: Tensor | None, mu: Tensor, parameter: Tensor, prior_mu: Tensor | None,
    prior_logvar: Tensor | None, eps: Tensor | None, seed: Tensor, dmu: Tensor, dparameter: Tensor,
    dprior_mu: Tensor | None, dprior_logvar: Tensor | None, *settings: Any,
) -> None:  # fmt: skip
    if dkl is None:  # not a KL gradient of zero, which would turn an infinite KL into NaN
        prior_mu = prior_logvar = None
    inputs, outputs = (dz, dkl, mu, parameter, prior_mu, prior_logvar, eps), (dmu, dparameter, dprior_mu, dprior_logvar)
    launch_bwd(inputs, outputs, seed, *settings)


@planned
def plan_bwd(
    inputs: Sequence[Any], outputs: Sequence[View | None], event_ndim: int | None, scale: str, low: float, high: float,
    live: bool, num_samples: int | None, stream: int,
) -> tuple[Plan, tuple[int, ...] | None, tuple[int, ...] | None] | None:  # fmt: skip
    """(the launch, the shape of what a shared prior's gradients are summed from, over which dimensions), or None."""
    dz, dkl, *inputs, eps = inputs
    mu, dtype = inputs[0], compute_dtype(inputs)
    shape = mu.shape
    shared = outputs[2] is not None and inputs[2].dim() < len(shape)
    inputs, outputs = expanded(inputs, shape), expanded(outputs, shape)
    incoming, incoming_step = first_sample(dz, num_samples, mu)
    noise, noise_step = first_sample(eps, num_samples, mu)
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
    of_kl = first_sample(None, None, mu)[0] if dkl is None else dkl.of_rows(shape)
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


def launch_bwd(inputs: Sequence[Any], outputs: Sequence[Tensor | None], seed: Tensor, *settings: Any) -> None:
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
    partial = None if shape is None else torch.empty(shape, dtype=dtype, device=mu.device)
    plan.launch(
        mu.new_zeros(()) if dz is None else dz, dkl, None if dkl is None else mu, parameter, prior_mu, prior_logvar,
        eps, *outputs[:2], *(outputs[2:] if partial is None else partial), seed,
    )  # fmt: skip
    return None if partial is None else finish(outputs[2:], partial.sum(over))
