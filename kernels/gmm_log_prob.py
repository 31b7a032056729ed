"""ln sum_k pi_k N_k(z) for a mixture that all rows share, and its gradients, by direct differences."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastkl.kernels._layout import cdiv, compute_dtype
from fastkl.kernels._mixture import STEP, TRITON_DTYPE, add_exponentials, blocks, joint_tile, prepare, split
from fastkl.kernels._mixture_gradient import gradients


def module(means, scale_tril, precision):
    """Whose fwd and bwd to call, None for this file's."""
    if scale_tril is not None:
        from fastkl.kernels import gmm_full as other
    elif means.shape[0] > 1:
        from fastkl.kernels import gmm_per_datum as other
    elif precision != "exact":
        from fastkl.kernels import gmm_dot as other
    else:
        return None
    return other


@triton.jit
def gmm_fwd_kernel(
    z, logvar, logits, normaliser, centre, constants, roots, scaled_means, lp, joints, rows, logit_rows, shape,
    strides, components_per_program, splits,
    FORM: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`splits` programs share a block of rows; lp is [splits, rows]. joints [rows, K], if wanted, takes each term."""
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(index, rows - 1)  # beyond the last row it again: no mask in the inner loop
    quad = tl.arange(0, 4).to(tl.int64)[None, :]
    z_at = z + row.to(tl.int64)[:, None] * strides[0][0] + quad * strides[0][1]
    steps = (strides[0][1] * 4, strides[1][1] * 4)
    logvar_at = None
    if logvar is not None:
        logvar_at = logvar + row.to(tl.int64)[:, None] * strides[1][0] + quad * strides[1][1]
    top = tl.full([ROWS], float("-inf"), dtype=DTYPE)
    total = tl.zeros([ROWS], dtype=DTYPE)
    first = split * components_per_program
    for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
        component = start + tl.arange(0, COMPONENTS)
        joint = joint_tile(
            z_at, logvar_at, logits, normaliser, centre, constants, roots, scaled_means, row % logit_rows, start, shape,
            steps, strides[2], FORM, TAIL, True, ROWS, COMPONENTS, DTYPE,
        )  # fmt: skip
        if joints is not None:
            at = row.to(tl.int64)[None, :] * shape[1] + component[:, None]
            mask = (component < shape[1])[:, None] & (index < rows)[None, :]
            tl.store(joints + at, joint, mask)
        top, total = add_exponentials(top, total, joint, 0)
    tl.store(lp + split.to(tl.int64) * rows + index, top + tl.log(total), mask=index < rows)


def launch_fwd(z, logvar, logits, means, logvars, form, *, joints=False):
    """(lp [R], joint log-densities [R, K] or None)."""
    tensors = [tensor for tensor in (z, logvar, logits, means, logvars) if tensor is not None]
    dtype, device = compute_dtype(tensors), z.device
    (rows, columns), components = z.shape, means.shape[1]
    joint = torch.empty((rows, components), dtype=dtype, device=device) if joints else None
    if rows == 0:
        return torch.empty(0, dtype=dtype, device=device), joint
    mixture = prepare(logits, means, logvars, form, dtype)
    block = blocks(dtype, form, "forward", rows, components, own=logits.shape[0] > 1)
    row_blocks = cdiv(rows, block["ROWS"])
    length, splits = split(components, block["COMPONENTS"], row_blocks, rows * dtype.itemsize)
    lp = torch.empty((splits, rows), dtype=dtype, device=device)
    gmm_fwd_kernel[(row_blocks * splits,)](
        z, logvar, None if logits.shape[0] == 1 else logits, *mixture, lp, joint, rows, logits.shape[0],
        (columns, components, mixture.padded),
        (z.stride(), (0, 0) if logvar is None else logvar.stride(), logits.stride()), length, splits,
        FORM=form, TAIL=columns % STEP != 0, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    return lp[0] if splits == 1 else lp.logsumexp(0), joint


def fwd(z, logvar, logits, means, logvars, scale_tril, form, precision):
    """ln p [R]; see fastkl.reference.gmm_joint_log_prob for `form`."""
    other = module(means, scale_tril, precision)
    if other is not None:
        return other.fwd(z, logvar, logits, means, logvars, scale_tril, form, precision)
    return launch_fwd(z, logvar, logits, means, logvars, form)[0]


def bwd(dlp, lp, z, logvar, logits, means, logvars, scale_tril, form, precision, data, parameters):
    """[dz, dlogvar] of the data, then [dlogits, dmeans, dlogvars] of the parameters; what is not there is left out."""
    other = module(means, scale_tril, precision)
    if other is not None:
        inputs = (z, logvar, logits, means, logvars, scale_tril)
        return other.bwd(dlp, lp, *inputs, form, precision, data, parameters)
    return gradients((dlp, lp, None, None), z, logvar, logits, means, logvars, form, data, parameters)
