"""Both bounds on KL(q || mixture) at once, for diagonal components and weights that all rows share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, compute_dtype, present
from fastkl.kernels.mixture._bounds import blocks, joint_tiles
from fastkl.kernels.mixture._bounds_gradient import by_components, by_rows
from fastkl.kernels.mixture._mixture import load_rows, quads
from fastkl.kernels.mixture._mixture_prepare import add_exponentials, prepare
from fastkl.kernels.mixture._mixture_tiles import scattered, split


@triton.jit
def kl_gmm_bounds_fwd_kernel(
    mu, logvar, normaliser, constants, roots, means, lower, upper, negative_entropy, rows, shape,
    mu_strides, logvar_strides, components_per_program, splits, TAIL: tl.constexpr, ROWS: tl.constexpr,
    COMPONENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Log-densities lower and upper [splits, rows] in float64; `splits` programs share a block of rows."""
    split = tl.program_id(0) % splits
    index = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(index, rows - 1).to(tl.int64)  # past the end the last row, which saves a mask in the loop
    mu_at, logvar_at = quads(mu, row, mu_strides), quads(logvar, row, logvar_strides)
    steps = (mu_strides[1] * 4, logvar_strides[1] * 4)
    low_top = tl.full([ROWS], float("-inf"), dtype=DTYPE)
    high_top = tl.full([ROWS], float("-inf"), dtype=DTYPE)
    low_total = tl.zeros([ROWS], dtype=DTYPE)
    high_total = tl.zeros([ROWS], dtype=DTYPE)
    first = split * components_per_program
    for start in range(first, tl.minimum(first + components_per_program, shape[1]), COMPONENTS):
        low, high = joint_tiles(
            mu_at, logvar_at, normaliser, constants, roots, means, start, shape, steps,
            TAIL, True, ROWS, COMPONENTS, DTYPE,
        )  # fmt: skip
        low_top, low_total = add_exponentials(low_top, low_total, low, 0)
        high_top, high_total = add_exponentials(high_top, high_total, high, 0)
    at = split.to(tl.int64) * rows + index
    tl.store(lower + at, low_top.to(tl.float64) + tl.log(low_total).to(tl.float64), mask=index < rows)
    tl.store(upper + at, high_top.to(tl.float64) + tl.log(high_total).to(tl.float64), mask=index < rows)
    if split == 0:
        total = tl.zeros([ROWS, 4], dtype=DTYPE)
        for d in range(0, shape[0], 4):
            total += load_rows(logvar_at, d, shape[0], TAIL, DTYPE)
            logvar_at += steps[1]
        value = -0.5 * (tl.sum(total, axis=1) + tl.full([ROWS], 2.8378770664093453, dtype=DTYPE) * shape[0])
        tl.store(negative_entropy + index, value.to(tl.float64), mask=index < rows)


def fused(mu: Tensor, logits: Tensor, means: Tensor, scale_tril: Tensor | None, precision: str) -> bool:
    """Weights or components of their own, full covariances and tensor cores go through the mixture's kernels twice."""
    return len(logits) == len(means) == 1 and scale_tril is None and precision == "exact" and len(mu) > 0


def fwd(
    mu: Tensor, logvar: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None,
    precision: str, keep: int,
) -> list[Tensor]:  # fmt: skip
    """[lower, upper], each [R], and with `keep` the two log-densities in float64."""
    if not fused(mu, logits, means, scale_tril, precision):
        return NotImplemented
    dtype = compute_dtype((mu, logvar, logits, means, logvars))
    (rows, columns), components, device = mu.shape, means.shape[1], mu.device
    mixture = prepare(logits, means, logvars, "bounds", dtype)
    odd = scattered(mu, logvar)
    block = blocks(dtype, "forward", rows, components, scattered=odd)
    row_blocks = cdiv(rows, block["ROWS"])
    length, splits = split(components, block["COMPONENTS"], row_blocks, 2 * rows * 8)
    lp = torch.empty((2, splits, rows), dtype=torch.float64, device=device)
    negative_entropy = torch.empty(rows, dtype=torch.float64, device=device)
    launch(
        kl_gmm_bounds_fwd_kernel, (row_blocks * splits,),
        mu, logvar, *mixture, *lp, negative_entropy, rows, (columns, components, mixture.padded),
        mu.stride(), logvar.stride(), length, splits, TAIL=odd == "tail", DTYPE=TRITON_DTYPE[dtype],
        enable_fp_fusion=True, **block,
    )  # fmt: skip
    lp = lp[:, 0] if splits == 1 else lp.logsumexp(1)
    bounds = torch.sub(negative_entropy, lp, out=torch.empty((2, rows), dtype=dtype, device=device))
    return [*bounds, *lp] if keep else [*bounds]


def bwd(
    dlower: Tensor | None, dupper: Tensor | None, lower_lp: Tensor, lower_responsibilities: Tensor | None,
    upper_lp: Tensor, upper_responsibilities: Tensor | None,
    mu: Tensor, logvar: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None,
    dmu: Tensor | None, dlogvar: Tensor | None, dlogits: Tensor | None, dmeans: Tensor | None, dlogvars: Tensor | None,
    dscale_tril: Tensor | None, precision: str,
) -> None:  # fmt: skip
    """Write the gradients of (mu, logvar) and of the mixture's tensors; None is not wanted.

    Those of the upper bound alone are cheaper by the mixture's kernels, which agree with these; those of the lower
    bound have a smaller range there.
    """
    if dlower is None or not fused(mu, logits, means, scale_tril, precision):
        return NotImplemented
    dtype = compute_dtype((mu, logvar, logits, means, logvars))
    dupper = torch.zeros_like(dlower) if dupper is None else dupper
    kept = (lower_lp.contiguous(), upper_lp.contiguous())  # a hook on saved tensors may lay them out anew
    mixture, given = prepare(logits, means, logvars, "bounds", dtype), (dlower, dupper, *kept)
    if present((dmu, dlogvar)):
        by_rows(given, mu, logvar, means.shape[1], mixture, (dmu, dlogvar))
    if present((dlogits, dmeans, dlogvars)):
        by_components(given, mu, logvar, logits, means, logvars, mixture, (dlogits, dmeans, dlogvars))
    return None
