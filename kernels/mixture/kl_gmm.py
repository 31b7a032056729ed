"""KL(q || mixture) by samples: one kernel draws z into a bounded buffer, on whose rows the mixture's kernels run.

Backward draws the noise again, once for z and once for the gradients of (mu, logvar), so no noise is saved. The
buffers, z and its gradient, hold as many samples as fit SAMPLES_BYTES, and at least one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE, exp
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import cdiv, compute_dtype, finish, present
from fastkl.kernels._noise import POSTERIOR, normals
from fastkl.kernels.mixture import gmm_log_prob

SAMPLES_BYTES = 32 << 20


def blocks(dtype: torch.dtype) -> dict[str, int]:
    """The block of elements of mu that one program processes for all samples."""
    return {"BLOCK": 1024 if dtype == torch.float32 else 512, "num_warps": 4}


@triton.jit
def draw(seed, start, sample, BLOCK: tl.constexpr):
    """The noise of BLOCK elements from `start` on, a multiple of 4."""
    return tl.reshape(normals(seed, start >> 2, sample, POSTERIOR, 1, BLOCK, False, False), [BLOCK])


@triton.jit
def kl_gmm_samples_kernel(
    mu, logvar, seed, z, eps, shape, mu_strides, logvar_strides, first, last, BLOCK: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """z, and eps if not None, [last - first, rows, columns], of the samples first to last."""
    rows, columns = shape
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    mask = index < rows.to(tl.int64) * columns
    row, column = index // columns, index % columns
    # Masked elements are not stored, so any fill is valid.
    m = tl.load(mu + row * mu_strides[0] + column * mu_strides[1], mask, other=0.0).to(DTYPE)
    v = tl.load(logvar + row * logvar_strides[0] + column * logvar_strides[1], mask, other=0.0).to(DTYPE)
    sigma = exp(0.5 * v)
    key = tl.load(seed)
    z += index
    if eps is not None:
        eps += index
    for sample in range(first, last):
        noise = draw(key, start, sample, BLOCK).to(DTYPE)
        tl.store(z, m + sigma * noise, mask)
        z += rows.to(tl.int64) * columns
        if eps is not None:
            tl.store(eps, noise, mask)
            eps += rows.to(tl.int64) * columns


@triton.jit
def kl_gmm_samples_bwd_kernel(
    dkl, dz, logvar, seed, dmu, dlogvar, shape, dkl_stride, logvar_strides, first, last, num_samples,
    STL: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients in (mu, logvar) from the gradients dz of the samples first to last, added to those of earlier
    samples. The first sample adds the entropy's gradient; with STL, d ln q(z) / dz of each sample replaces it."""
    rows, columns = shape
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    mask = index < rows.to(tl.int64) * columns
    row, column = index // columns, index % columns
    # Masked elements are not stored, so any fill is valid.
    gradient = tl.load(dkl + row * dkl_stride, mask, other=0.0).to(DTYPE)
    v = tl.load(logvar + row * logvar_strides[0] + column * logvar_strides[1], mask, other=0.0).to(DTYPE)
    sigma = exp(0.5 * v)
    key = tl.load(seed)
    total = tl.zeros([BLOCK], dtype=DTYPE)
    total_noise = tl.zeros([BLOCK], dtype=DTYPE)
    dz += index
    for sample in range(first, last):
        noise = draw(key, start, sample, BLOCK).to(DTYPE)
        d = tl.load(dz, mask, other=0.0).to(DTYPE)
        if STL:
            d -= gradient * noise / (sigma * num_samples)
        total += d
        total_noise += d * noise
        dz += rows.to(tl.int64) * columns
    total_noise *= 0.5 * sigma
    again = mask & (index * 0 + first > 0)  # the first sample starts from 0
    if not STL:
        total_noise -= tl.where(again, 0.0, 0.5 * gradient)
    tl.store(dmu + index, tl.load(dmu + index, again, other=0.0) + total, mask)
    tl.store(dlogvar + index, tl.load(dlogvar + index, again, other=0.0) + total_noise, mask)


def _chunks(mu: Tensor, num_samples: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """The (first, last) sample of each buffer."""
    step = max(1, SAMPLES_BYTES // max(1, mu.numel() * dtype.itemsize))
    return [(first, min(first + step, num_samples)) for first in range(0, num_samples, step)]


def _samples(
    mu: Tensor, logvar: Tensor, seed: Tensor, first: int, last: int, dtype: torch.dtype, *, with_eps: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(z, eps or None), [samples, R, D]."""
    z = torch.empty((last - first, *mu.shape), dtype=dtype, device=mu.device)
    eps = torch.empty_like(z) if with_eps else None
    block = blocks(dtype)
    launch(
        kl_gmm_samples_kernel, (cdiv(mu.numel(), block["BLOCK"]),),
        mu, logvar, seed, z, eps, tuple(mu.shape), mu.stride(), logvar.stride(), first, last,
        DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
    )  # fmt: skip
    return z, eps


def fwd(
    mu: Tensor, logvar: Tensor, seed: Tensor, logits: Tensor, means: Tensor, logvars: Tensor | None,
    scale_tril: Tensor | None, num_samples: int, precision: str, entropy: str, stl: bool,
) -> Tensor:  # fmt: skip
    """KL [R]; see fastkl.reference.kl_gmm."""
    mixture = (logits, means, logvars, scale_tril)
    dtype = compute_dtype((mu, logvar, *mixture))
    total = -0.5 * num_samples * (logvar.to(dtype) + math.log(2 * math.pi)).sum(-1)
    if entropy == "closed":
        total -= 0.5 * num_samples * mu.shape[1]
    for first, last in _chunks(mu, num_samples, dtype):
        z, eps = _samples(mu, logvar, seed, first, last, dtype, with_eps=entropy == "sampled")
        found = gmm_log_prob.fwd(z.flatten(0, 1), None, *mixture, "point", precision, 0)
        if found is NotImplemented:
            return found
        total -= found[0].view(last - first, -1).sum(0)
        if eps is not None:
            total -= 0.5 * eps.square().sum((0, 2))
    return total / num_samples


def bwd(
    dkl: Tensor, mu: Tensor, logvar: Tensor, seed: Tensor,
    logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor | None,
    dmu: Tensor | None, dlogvar: Tensor | None, dlogits: Tensor | None, dmeans: Tensor | None, dlogvars: Tensor | None,
    dscale_tril: Tensor | None, num_samples: int, precision: str, stl: bool,
) -> None:  # fmt: skip
    """Write the gradients of (mu, logvar) and of the mixture's tensors; None is not wanted."""
    outputs = [dlogits, dmeans, dlogvars, dscale_tril]
    dtype = compute_dtype((mu, logvar, logits, means, logvars, scale_tril))
    chunks, sums = _chunks(mu, num_samples, dtype), outputs
    if len(chunks) > 1:  # sums over chunks are in the compute dtype
        logits, means = logits.to(dtype), means.to(dtype)
        logvars, scale_tril = (None if t is None else t.to(dtype) for t in (logvars, scale_tril))
        sums = [None if t is None else torch.zeros_like(t, dtype=dtype) for t in outputs]
    mixture = (logits, means, logvars, scale_tril)
    data, block = present((dmu, dlogvar)), blocks(dtype)
    rows = [torch.empty(mu.shape, dtype=dtype, device=mu.device) for _ in range(2 if data else 0)]
    for first, last in chunks:
        z = _samples(mu, logvar, seed, first, last, dtype)[0].flatten(0, 1)
        kept = gmm_log_prob.fwd(z, None, *mixture, "point", precision, 1)
        if kept is NotImplemented:
            return kept
        dlp = (dkl.to(dtype) / -num_samples).repeat(last - first)
        dz = torch.empty_like(z) if data else None
        found = sums if len(chunks) == 1 else [None if t is None else torch.empty_like(t) for t in sums]
        a, b, c, d = found
        gmm_log_prob.bwd(dlp, kept[1], None, z, None, *mixture, dz, None, a, b, c, d, "point", precision)
        if data:
            launch(
                kl_gmm_samples_bwd_kernel, (cdiv(mu.numel(), block["BLOCK"]),),
                dkl, dz, logvar, seed, *rows, tuple(mu.shape), dkl.stride(0), logvar.stride(), first, last,
                num_samples, STL=stl, DTYPE=TRITON_DTYPE[dtype], enable_fp_fusion=True, **block,
            )  # fmt: skip
        if found is not sums:
            sums = [None if a is None or b is None else a + b for a, b in zip(sums, found)]
    finish((dmu, dlogvar, *outputs), [*(rows or (None, None)), *sums])
    return None
