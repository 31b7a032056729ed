"""Log-density of a mixture with full covariances, S_k = L_k L_k^T: y = P_k (z - m_k), P_k = L_k^-1, tiled.

An N x K block of joint log-densities costs little beside N K D^2 / 2 products. Rows therefore come in blocks whose
joint log-density takes at most 32 MiB, each (block of rows, component) is one program, and responsibilities are
normalised exactly. P is computed for at most 32 MiB of components at a time. Backward stores y in a third such buffer,
and torch computes its products (y^T w y, w y P), for which "exact" follows torch.backends.cuda.matmul (float32 by
default).

Gradients, with w = dlp r, g = sum_n w y, A = sum_n w y y^T [+ P diag(sum_n w sigma^2) P^T if "expected"]:
dz = -sum_k w P^T y, dm = P^T g, dL = tril(P^T A) - sum_n w diag(1 / L_ii).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import TRITON_DTYPE
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import OLD_COMPILER, cdiv, clear, compute_dtype, next_power_of_2, present, registers

INPUT_PRECISION = {"exact": "ieee", "tf32x3": "tf32x3", "tf32": "tf32"}
BUFFER_BYTES = 32 << 20


def supported(precision: Any, _semantic: Any = None) -> Any:
    """In a kernel: `precision`, or "ieee" if the target's tl.dot does not support it (tf32x3 on AMD)."""
    name = getattr(precision, "value", precision)
    options = getattr(getattr(_semantic, "builder", None), "options", None)
    if name not in getattr(options, "allowed_dot_input_precisions", (name,)):
        name = "ieee"
    return tl.constexpr(name)


supported.__triton_builtin__ = True  # type: ignore[attr-defined]  # lets a kernel call it at compile time


def blocks(columns: int, dtype: torch.dtype, precision: str) -> dict[str, int]:
    """ROWS x COLUMNS of y, whose products are summed INNER at a time."""
    rows, most, warps = (32, 64, 4) if columns % 16 else (64, 64, 8 if precision == "exact" else 4)
    if dtype == torch.float64:
        rows, most, warps = 16, 32, 4
    block_columns = min(most, max(16, next_power_of_2(columns)))
    held = registers(255) if OLD_COMPILER and precision != "exact" else {}
    return {"ROWS": rows, "COLUMNS": block_columns, "INNER": 16, "num_warps": warps, "num_stages": 1, **held}


@triton.jit
def gmm_full_joint_kernel(
    z, means, roots, log_weights, log_determinants, joint, whitened, shape,
    z_strides, means_strides, roots_strides, log_weights_strides, joint_strides,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One component at ROWS rows. Writes ln pi + ln N(z; m, S) to joint, or y to whitened.

    shape is (rows, components, columns, rows of log_weights, first row).
    """
    rows, columns = shape[0], shape[2]
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    component = tl.program_id(0) // row_blocks + tl.zeros_like(row)
    k = component.to(tl.int64)
    z += row.to(tl.int64)[:, None] * z_strides[0]
    means += tl.max(k, axis=0) * means_strides[0]
    roots += tl.max(k, axis=0) * roots_strides[0]
    quadratic = tl.zeros([ROWS], dtype=DTYPE)
    for start in range(0, columns, COLUMNS):
        out = start + tl.arange(0, COLUMNS)
        y = tl.zeros([ROWS, COLUMNS], dtype=DTYPE)
        for start_inner in range(0, tl.minimum(start + COLUMNS, columns), INNER):  # P is 0 above the diagonal
            inner = start_inner + tl.arange(0, INNER)
            inside = inner < columns
            # other=0.0: a difference of 0 and a row of zeros are neutral in a product.
            mask = row_inside[:, None] & inside[None, :]
            x = tl.load(z + inner[None, :] * z_strides[1], mask, other=0.0).to(DTYPE)
            m = tl.load(means + inner * means_strides[1], inside, other=0.0).to(DTYPE)
            at = inner.to(tl.int64)[:, None] * roots_strides[2] + out.to(tl.int64)[None, :] * roots_strides[1]
            root = tl.load(roots + at, inside[:, None] & (out < columns)[None, :], other=0.0)
            y = tl.dot(x - m[None, :], root, y, input_precision=supported(PRECISION), out_dtype=DTYPE)
        if whitened is None:
            quadratic += tl.sum(y * y, axis=1)
        else:
            at = (row.to(tl.int64) * shape[1] + k)[:, None] * columns + out[None, :]
            tl.store(whitened + at, y, row_inside[:, None] & (out < columns)[None, :])
    if whitened is None:
        at = ((row + shape[4]) % shape[3]).to(tl.int64) * log_weights_strides[0] + k * log_weights_strides[1]
        a = tl.load(log_weights + at, row_inside, other=0.0) - tl.load(log_determinants + k)  # rows outside stay unread
        tl.store(joint + row.to(tl.int64) * joint_strides[0] + k * joint_strides[1], a - 0.5 * quadratic, row_inside)


def blocks_of_rows(rows: int, period: int, most: int) -> Iterator[slice]:
    """Slices of at most `most` rows: whole periods of the logits' rows, or parts of one."""
    step = max(most // period * period, period)
    length = step if period <= most else most
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield from (slice(first, min(first + length, end)) for first in range(begin, end, length))


def add_logits_gradient(dlogits: Tensor, weight: Tensor, incoming: Tensor, log_weights: Tensor, first: int) -> None:
    """w - softmax(logits) dlp, summed over the rows of such a block that share their logits."""
    period = len(dlogits)
    if len(weight) >= period:
        weight, incoming = (tensor.unflatten(0, (-1, period)).sum(0) for tensor in (weight, incoming))
    some = slice(first % period, first % period + len(weight))
    dlogits[some] += weight - log_weights[some].exp() * incoming


def pieces(rows: slice, components: slice, elements: int) -> Iterator[tuple[slice, slice]]:
    """(rows, components) in pieces of at most `elements` pairs, unless a row of one component is more."""
    some = min(components.stop - components.start, elements)
    length = max(1, elements // some)
    for first in range(rows.start, rows.stop, length):
        for k in range(components.start, components.stop, some):
            yield slice(first, min(first + length, rows.stop)), slice(k, min(k + some, components.stop))


class Whitening:
    """Shared by the passes over the components; computes P for a chunk of components at a time."""

    def __init__(
        self, z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, scale_tril: Tensor, precision: str
    ) -> None:
        self.dtype = compute_dtype((z, logvar, logits, means, scale_tril))
        self.z, self.logvar, self.means, self.scale, self.precision = z, logvar, means[0], scale_tril[0], precision
        self.log_weights = torch.log_softmax(logits, -1, dtype=self.dtype)
        components, columns = self.means.shape
        diagonal = self.scale.diagonal(dim1=-2, dim2=-1).to(self.dtype)
        self.log_determinants = diagonal.log().sum(-1) + 0.5 * math.log(2 * math.pi) * columns
        elements = BUFFER_BYTES // self.dtype.itemsize
        self.rows_per_block = max(1, elements // max(components, columns))
        chunk = max(1, elements // max(1, columns * columns))
        self.chunks = [slice(k, min(k + chunk, components)) for k in range(0, components, chunk)]
        self.known: dict[int, Tensor] = {}

    def root(self, part: slice) -> Tensor:
        """P of some components; kept if they are all."""
        if part.start in self.known:
            return self.known[part.start]
        scale = self.scale[part].to(self.dtype)
        eye = torch.eye(scale.shape[-1], dtype=self.dtype, device=scale.device)
        root = torch.linalg.solve_triangular(scale, eye.expand_as(scale), upper=False)
        if len(self.chunks) == 1:
            self.known[part.start] = root
        return root

    def launch(self, rows: slice, part: slice, root: Tensor, joint: Tensor | None, whitened: Tensor | None) -> None:
        z, means = self.z[rows], self.means[part]
        block = blocks(z.shape[1], self.dtype, self.precision)
        log_weights = self.log_weights[:, part]
        launch(
            gmm_full_joint_kernel, (cdiv(len(z), block["ROWS"]) * len(means),),
            z, means, root, log_weights, self.log_determinants[part], joint, whitened,
            (*z.shape[:1], *means.shape, len(log_weights), rows.start), z.stride(), means.stride(), root.stride(),
            log_weights.stride(), (0, 0) if joint is None else joint.stride(),
            PRECISION=INPUT_PRECISION[self.precision], DTYPE=TRITON_DTYPE[self.dtype], enable_fp_fusion=True, **block,
        )  # fmt: skip

    def variance(self, rows: slice) -> Tensor | None:
        return None if self.logvar is None else self.logvar[rows].to(self.dtype).exp()

    def joint(self, rows: slice) -> Tensor:
        out = torch.empty((rows.stop - rows.start, len(self.means)), dtype=self.dtype, device=self.z.device)
        variance = self.variance(rows)
        for part in self.chunks:
            root = self.root(part)
            self.launch(rows, part, root, out[:, part], None)
            if variance is not None:  # tr(S^-1 diag sigma^2)
                out[:, part].addmm_(variance, root.square().sum(1).mT, alpha=-0.5)
        return out


def fwd(
    z: Tensor, logvar: Tensor | None, logits: Tensor, means: Tensor, logvars: Tensor | None, scale_tril: Tensor,
    form: str, precision: str,
) -> Tensor:  # fmt: skip
    mixture = Whitening(z, logvar, logits, means, scale_tril, precision)
    lp = torch.zeros(len(z), dtype=mixture.dtype, device=z.device)  # 0 is the value without dimensions
    if z.numel():
        for rows in blocks_of_rows(len(z), len(logits), mixture.rows_per_block):
            lp[rows] = mixture.joint(rows).logsumexp(1)
    return lp


def bwd(
    dlp: Tensor, lp: Tensor, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor],
    outputs: Sequence[Tensor | None], form: str, precision: str,
) -> None:  # fmt: skip
    """Write the outputs, the gradients of gmm_log_prob's inputs; None is not wanted."""
    z, logvar, logits, means, _, scale_tril = inputs
    dz, dlogvar, dlogits, dmeans, _, dscale_tril = outputs
    if z.numel() == 0:
        return clear(outputs)
    data, parameters = present((dz, dlogvar)), present((dlogits, dmeans, dscale_tril))
    mixture = Whitening(z, logvar, logits, means, scale_tril, precision)
    components, columns = mixture.means.shape
    zeros: dict[str, Any] = dict(dtype=mixture.dtype, device=z.device)
    if parameters:
        weight_sum, variance_sum = torch.zeros(components, **zeros), torch.zeros(components, columns, **zeros)
        first, second = torch.zeros(components, columns, **zeros), torch.zeros(components, columns, columns, **zeros)
        sums = torch.zeros(logits.shape, **zeros)
    for rows in blocks_of_rows(len(z), len(logits), mixture.rows_per_block):
        incoming = dlp[rows, None].to(mixture.dtype)
        weight = mixture.joint(rows).softmax(1).mul_(incoming)
        weight.masked_fill_(incoming == 0, 0.0)  # NaN in rows of density 0
        variance = mixture.variance(rows)
        of_z, of_variance = (torch.zeros((len(weight), columns), **zeros) for _ in range(2))
        per_chunk = max(1, BUFFER_BYTES // mixture.dtype.itemsize // columns)
        for part in mixture.chunks:
            root = mixture.root(part)
            if data and variance is not None:
                of_variance.addmm_(weight[:, part], root.square().sum(1), alpha=-0.5)
            if parameters and variance is not None:
                variance_sum[part].addmm_(weight[:, part].mT, variance)
            for some_rows, some in pieces(rows, part, per_chunk):
                inside = slice(some_rows.start - rows.start, some_rows.stop - rows.start)
                some_root = root[some.start - part.start : some.stop - part.start]
                y = torch.empty((some_rows.stop - some_rows.start, some.stop - some.start, columns), **zeros)
                mixture.launch(some_rows, some, some_root, None, y)
                weighted = y * weight[inside, some, None]
                if data:
                    of_z[inside].addmm_(weighted.flatten(1), some_root.flatten(0, 1), alpha=-1)
                if parameters:
                    first[some] += weighted.sum(0)
                    second[some].baddbmm_(weighted.permute(1, 2, 0), y.transpose(0, 1))
        if dz is not None:
            dz[rows] = of_z.to(z.dtype)
        if dlogvar is not None and variance is not None:
            dlogvar[rows] = of_variance.mul_(variance).to(dlogvar.dtype)
        if parameters:
            weight_sum += weight.sum(0)
            add_logits_gradient(sums, weight, incoming, mixture.log_weights, rows.start)
    if dlogits is not None:
        dlogits.copy_(sums)
    for part in mixture.chunks if present((dmeans, dscale_tril)) else ():
        root = mixture.root(part)
        if dmeans is not None:
            dmeans[0, part] = (root.mT @ first[part, :, None])[..., 0].to(means.dtype)
        if dscale_tril is not None:
            total = second[part] if logvar is None else second[part] + (root * variance_sum[part, None]) @ root.mT
            inverse = torch.diag_embed(weight_sum[part, None] * root.diagonal(dim1=-2, dim2=-1))
            dscale_tril[0, part] = ((root.mT @ total).tril() - inverse).to(scale_tril.dtype)
    return None
