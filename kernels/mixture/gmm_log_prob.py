"""ln sum_k pi_k N_k(z) for a mixture that all rows share, and its gradients, by direct differences."""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE, exp, finite
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import DOT_TAKES_FLOAT64, cdiv, compute_dtype, strides_of
from fastkl.kernels.mixture._mixture import joint_tile, of_rows, quads, term_index
from fastkl.kernels.mixture._mixture_gradient import gradients
from fastkl.kernels.mixture._mixture_prepare import add_exponentials, prepare
from fastkl.kernels.mixture._mixture_tiles import blocks, scattered, split


def module(
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None], scale_tril: Tensor | None, form: str,
    precision: str,
) -> ModuleType | None:  # fmt: skip
    """The module whose fwd and bwd to call; None for this file."""
    if scale_tril is not None:
        from fastkl.kernels.mixture import gmm_full

        return gmm_full
    if inputs[3].shape[0] > 1:
        from fastkl.kernels.mixture import gmm_per_datum

        return gmm_per_datum
    if precision != "exact":
        from fastkl.kernels.mixture import gmm_dot

        return gmm_dot if gmm_dot.has_kernel(form, *inputs) else None
    return None


def has_kernel(means: Tensor, scale_tril: Tensor | None, form: str, dtype: torch.dtype) -> bool:
    """Full covariances have one for a mixture that all rows share; convolved, each row and component is a matrix."""
    if scale_tril is None:
        return True
    return means.shape[0] == 1 and form != "convolved" and (DOT_TAKES_FLOAT64 or dtype == torch.float32)


@triton.jit
def gmm_fwd_kernel(
    z, logvar, logits, normaliser, constants, roots, means, lp, joints, rows, logit_rows, shape,
    z_strides, logvar_strides, logits_strides, components_per_program, splits,
    FORM: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, TERMS: tl.constexpr,
    LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """lp [splits, rows] in float64, and each term in joints [rows, K]; `splits` programs share a block of rows."""
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(index, rows - 1)  # past the end the last row, which saves a mask in the loop
    z_at, logvar_at = quads(z, row, z_strides), None
    steps = (z_strides[1] * 4, logvar_strides[1] * 4)
    if logvar is not None:
        logvar_at = quads(logvar, row, logvar_strides)
    # Maximum and sum of each group, merged at the end.
    top = tl.full([ROWS // LANES, COMPONENTS // TERMS, LANES], float("-inf"), dtype=DTYPE)
    total = tl.zeros([ROWS // LANES, COMPONENTS // TERMS, LANES], dtype=DTYPE)
    first = split * components_per_program
    for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
        joint = joint_tile(
            z_at, logvar_at, logits, normaliser, constants, roots, means, row % logit_rows, start, shape,
            steps, logits_strides, FORM, TAIL, True, ROWS, COMPONENTS, TERMS, LANES, DTYPE,
        )  # fmt: skip
        if joints is not None:
            component = start + term_index(COMPONENTS, TERMS)
            at = of_rows(row.to(tl.int64) * shape[1], True, TERMS, LANES) + component
            tl.store(joints + at, joint, (component < shape[1]) & of_rows(index < rows, True, TERMS, LANES))
        top, total = add_exponentials(top, total, joint, 1)
    highest = tl.max(top, axis=1)
    reference = finite(highest)
    total = tl.sum(total * exp(top - reference[:, None, :]), axis=1)
    value = reference.to(tl.float64) + tl.log(total).to(tl.float64)
    value = tl.reshape(tl.permute(value, [1, 0]), [ROWS])
    tl.store(lp + split.to(tl.int64) * rows + index, value, mask=index < rows)


def launch_fwd(
    z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None, form: str,
    joints: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """lp [R] in float64. Joint log-densities go to `joints` [R, K]."""
    dtype, device = compute_dtype((z, logvar, logits, means, logvars)), z.device
    (rows, columns), components = z.shape, means.shape[1]
    if rows == 0:
        return torch.empty(0, dtype=torch.float64, device=device)
    mixture = prepare(logits, means, logvars, form, dtype)
    own, odd = logits.shape[0] > 1, scattered(z, logvar)
    wanted = joints is not None
    block = blocks(dtype, form, "forward", rows, components, own=own or wanted, scattered=odd, given=own and wanted)
    row_blocks = cdiv(rows, block["ROWS"])
    length, splits = split(components, block["COMPONENTS"], row_blocks, rows * 8)
    lp = torch.empty((splits, rows), dtype=torch.float64, device=device)
    launch(
        gmm_fwd_kernel, (row_blocks * splits,),
        z, logvar, None if logits.shape[0] == 1 else logits, *mixture, lp, joints, rows, logits.shape[0],
        (columns, components, mixture.padded), z.stride(), strides_of(logvar), logits.stride(), length, splits,
        FORM=form, TAIL=odd == "tail", DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    return lp[0] if splits == 1 else lp.logsumexp(0)


def fwd(
    z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None,
    scale_tril: Tensor | None, form: str, precision: str, keep: int,
) -> list[Tensor]:  # fmt: skip
    """[ln p [R]], and with `keep` ln p in float64; see fastkl.reference.gmm_joint_log_prob for `form`.

    float64, because log-densities are large far from every component, and a rounding error of ln p scales every
    responsibility exp(joint - ln p).
    """
    inputs = (z, logvar, logits, means, logvars)
    dtype = compute_dtype((*inputs, scale_tril))
    if not has_kernel(means, scale_tril, form, dtype):
        return NotImplemented
    other = module(inputs, scale_tril, form, precision)
    lp = launch_fwd(*inputs, form) if other is None else other.fwd(*inputs, scale_tril, form, precision)
    return [lp.to(dtype, copy=True), lp.double()][: 1 + (keep > 0)]


def bwd(
    dlp: Tensor, lp: Tensor, responsibilities: Tensor | None,
    z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None,
    dz: Tensor | None, dlogvar: Tensor | None, dlogits: Tensor | None, dmeans: Tensor | None, dlogvars: Tensor | None,
    dscale_tril: Tensor | None, form: str, precision: str,
) -> None:  # fmt: skip
    """Write the gradients; None is not wanted. lp is ln p in float64. Responsibilities are computed anew."""
    inputs, outputs = (z, logvar, logits, means, logvars), (dz, dlogvar, dlogits, dmeans, dlogvars)
    if not has_kernel(means, scale_tril, form, compute_dtype((*inputs, scale_tril))):
        return NotImplemented
    # A hook on saved tensors may lay out anew what was kept.
    lp, other = lp.contiguous(), module(inputs, scale_tril, form, precision)
    if other is not None:
        return other.bwd(dlp, lp, (*inputs, scale_tril), (*outputs, dscale_tril), form, precision)
    return gradients((dlp, lp, None, None), inputs, outputs, form)
