"""The products of gmm_dot: its three kernels, and their launches for a block of rows."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels._device import exp, finite, two_parts, weighted
from fastkl.kernels._launch import launch
from fastkl.kernels._layout import OLD_COMPILER, PROGRAMS, cdiv, next_power_of_2, registers, share, strides_of
from fastkl.kernels._tuned import GMM_DOT
from fastkl.kernels.mixture.gmm_full import BUFFER_BYTES, supported


def blocks(kernel: str, columns: int) -> dict[str, int]:
    """A tile of one kernel's product, as _tuned.py has it: INNER terms are summed at a time."""
    rows, most, inner, warps, stages = GMM_DOT[kernel]
    block_columns = min(min(most, 32) if columns % 16 else most, max(16, next_power_of_2(columns)))
    held = registers(255) if OLD_COMPILER else {}
    return {"ROWS": rows, "COLUMNS": block_columns, "INNER": inner, "num_warps": warps, "num_stages": stages, **held}


@triton.jit
def load(pointer, row, column, rows, columns, strides, OTHER: tl.constexpr = 0.0):
    """Elements [row, column] in float32; outside the tensor OTHER, by default 0, which is neutral in a product."""
    at = row.to(tl.int64)[:, None] * strides[0] + column.to(tl.int64)[None, :] * strides[1]
    return tl.load(pointer + at, (row < rows)[:, None] & (column < columns)[None, :], other=OTHER).to(tl.float32)


@triton.jit
def load_rows(z, logvar, centre, row, column, rows, columns, z_strides, logvar_strides):
    """x = z - c and x^2 + sigma^2. Columns outside are 0; rows outside are finite, have weight 0 and are not stored."""
    x = load(z, row, column, rows, columns, z_strides)
    x -= tl.load(centre + column, column < columns, other=0.0)[None, :]
    square = x * x
    if logvar is not None:
        square += exp(load(logvar, row, column, rows, columns, logvar_strides, float("-inf")))  # a variance of 0
    return x, square


@triton.jit
def gmm_dot_kernel(
    z, logvar, centre, precisions, scaled_means, log_weights, constants, dlp, lp, weight, shape,
    z_strides, logvar_strides, log_weights_strides, dlp_stride, components_per_program,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """ROWS rows by some components. Writes their log-sum-exp to lp or, if `weight` is given, dlp exp(a - lp) to weight.

    shape is (rows, components, columns, rows of log_weights, first row); without weight, lp is [splits, rows].
    """
    rows, components, columns = shape[0], shape[1], shape[2]
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(0) // row_blocks
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    begin = split * components_per_program
    for start in range(begin, tl.minimum(begin + components_per_program, components), COLUMNS):
        component = start + tl.arange(0, COLUMNS)
        a = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start_inner in range(0, columns, INNER):
            inner = start_inner + tl.arange(0, INNER)
            x, square = load_rows(z, logvar, centre, row, inner, rows, columns, z_strides, logvar_strides)
            at = component.to(tl.int64)[None, :] * columns + inner[:, None]
            inside = (inner < columns)[:, None] & (component < components)[None, :]
            # other=0.0 is neutral in a product.
            scaled_mean = tl.load(scaled_means + at, inside, other=0.0)
            a = tl.dot(x, scaled_mean, a, input_precision=supported(PRECISION))
            precision = tl.load(precisions + at, inside, other=0.0)
            a = tl.dot(-0.5 * square, precision, a, input_precision=supported(PRECISION))
        at = ((row + shape[4]) % shape[3]).to(tl.int64)[:, None] * log_weights_strides[0]
        at += component[None, :] * log_weights_strides[1]
        a += tl.load(constants + component, component < components, other=0.0)[None, :]
        a += tl.load(log_weights + at, (component < components)[None, :], other=float("-inf"))  # a weight of zero
        if weight is None:
            new_peak = tl.maximum(peak, tl.max(a, axis=1))
            top = finite(new_peak)
            total = total * tl.exp(peak - top) + tl.sum(tl.exp(a - top[:, None]), axis=1)
            peak = new_peak
        else:
            # Rows outside are not stored.
            high, low = two_parts(tl.load(lp + row, row < rows, other=0.0), tl.float32)
            incoming = tl.load(dlp + row.to(tl.int64) * dlp_stride, row < rows, other=0.0)
            at = row.to(tl.int64)[:, None] * components + component[None, :]
            inside = (row < rows)[:, None] & (component < components)[None, :]
            tl.store(weight + at, weighted(incoming[:, None], tl.exp(a - high[:, None] - low[:, None])), inside)
    if weight is None:
        top = finite(peak)
        value = top.to(tl.float64) + tl.log(total).to(tl.float64)
        tl.store(lp + split.to(tl.int64) * rows + row, value, row < rows)


@triton.jit
def gmm_dot_by_rows_kernel(
    z, logvar, centre, precisions, scaled_means, weight, dz, dlogvar, shape,
    z_strides, logvar_strides, dz_strides, dlogvar_strides,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of dz (and dlogvar): the weights times the components' precisions and scaled means."""
    rows, components, columns = shape[0], shape[1], shape[2]
    row_blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    second = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, components, INNER):
        component = start + tl.arange(0, INNER)
        w = load(weight, row, component, rows, components, (components, 1))
        means = load(scaled_means, component, column, components, columns, (columns, 1))
        roots = load(precisions, component, column, components, columns, (columns, 1))
        first = tl.dot(w, means, first, input_precision=supported(PRECISION))
        second = tl.dot(w, roots, second, input_precision=supported(PRECISION))
    x, _ = load_rows(z, logvar, centre, row, column, rows, columns, z_strides, logvar_strides)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * dz_strides[0] + column.to(tl.int64)[None, :] * dz_strides[1]
    tl.store(dz + at, first - x * second, inside)
    if logvar is not None:
        at = row.to(tl.int64)[:, None] * dlogvar_strides[0] + column.to(tl.int64)[None, :] * dlogvar_strides[1]
        tl.store(dlogvar + at, -0.5 * exp(load(logvar, row, column, rows, columns, logvar_strides)) * second, inside)


@triton.jit
def gmm_dot_by_components_kernel(
    z, logvar, centre, weight, partial, shape, z_strides, logvar_strides, rows_per_program,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of w^T x and w^T (x^2 + sigma^2), with ROWS components; partial is [splits, 2, components, columns]."""
    rows, components, columns = shape[0], shape[1], shape[2]
    component_blocks, column_blocks = tl.cdiv(components, ROWS), tl.cdiv(columns, COLUMNS)
    component = tl.program_id(0) % component_blocks * ROWS + tl.arange(0, ROWS)
    rest = tl.program_id(0) // component_blocks
    column = rest % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    split = rest // column_blocks
    first = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    second = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    begin = split * rows_per_program
    for start in range(begin, tl.minimum(begin + rows_per_program, rows), INNER):
        row = start + tl.arange(0, INNER)
        w = load(weight, component, row, components, rows, (1, components))
        x, square = load_rows(z, logvar, centre, row, column, rows, columns, z_strides, logvar_strides)
        first = tl.dot(w, x, first, input_precision=supported(PRECISION))
        second = tl.dot(w, square, second, input_precision=supported(PRECISION))
    inside = (component < components)[:, None] & (column < columns)[None, :]
    at = ((2 * split + component * 0).to(tl.int64) * components + component)[:, None] * columns + column[None, :]
    tl.store(partial + at, first, inside)
    tl.store(partial + at + components.to(tl.int64) * columns, second, inside)


class Products:
    """The components as the kernels' products want them, [K, D] each, and the launches on a block of rows."""

    def __init__(self, logits: Tensor, means: Tensor, logvars: Tensor | None, precision: str) -> None:
        self.means = means[0].float()
        self.components, self.columns = self.means.shape
        self.log_weights = torch.log_softmax(logits, -1, dtype=torch.float32)
        self.centre = self.means.mean(0)
        self.centred = self.means - self.centre
        spread = torch.zeros_like(self.means) if logvars is None else logvars[0].float().expand(self.means.shape)
        self.precisions = torch.exp(-spread).contiguous()
        self.scaled_means = (self.centred * self.precisions).contiguous()
        quadratic = (self.centred * self.scaled_means + spread).sum(1)
        self.constants = -0.5 * (quadratic + self.columns * math.log(2 * math.pi))
        self.precision = precision

    def launch(
        self, z: Tensor, logvar: Tensor | None, first_row: int, given: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """lp [R] in float64; given (dlp, lp, weight), it writes the weight."""
        block = blocks("forward", self.components)
        row_blocks = cdiv(len(z), block["ROWS"])
        per_program, splits = self.components, 1
        if given is None:
            per_program, splits = share(self.components, block["COLUMNS"], PROGRAMS // row_blocks)
        dlp, lp, weight = given or (None, torch.empty((splits, len(z)), dtype=torch.float64, device=z.device), None)
        launch(
            gmm_dot_kernel, (row_blocks * splits,),
            z, logvar, self.centre, self.precisions, self.scaled_means, self.log_weights, self.constants, dlp, lp,
            weight, (len(z), self.components, self.columns, len(self.log_weights), first_row),
            *map(strides_of, (z, logvar)), self.log_weights.stride(), 0 if dlp is None else dlp.stride(0), per_program,
            PRECISION=self.precision, enable_fp_fusion=True, **block,
        )  # fmt: skip
        if given is None:
            return lp[0] if splits == 1 else lp.logsumexp(0)
        return lp

    def launch_by_rows(
        self, z: Tensor, logvar: Tensor | None, weight: Tensor, dz: Tensor | None, dlogvar: Tensor | None
    ) -> None:
        block = blocks("by_rows", self.columns)
        launch(
            gmm_dot_by_rows_kernel, (cdiv(len(z), block["ROWS"]) * cdiv(self.columns, block["COLUMNS"]),),
            z, logvar, self.centre, self.precisions, self.scaled_means, weight, dz, dlogvar,
            (len(z), self.components, self.columns), *map(strides_of, (z, logvar, dz, dlogvar)),
            PRECISION=self.precision, enable_fp_fusion=True, **block,
        )  # fmt: skip

    def launch_by_components(self, z: Tensor, logvar: Tensor | None, weight: Tensor) -> Tensor:
        """[2, K, D]: sum_n w x and sum_n w (x^2 + sigma^2)."""
        block = blocks("by_components", self.columns)
        tiles = cdiv(self.components, block["ROWS"]) * cdiv(self.columns, block["COLUMNS"])
        most = max(1, min(PROGRAMS // tiles, BUFFER_BYTES // (8 * self.components * self.columns)))
        rows_per_program, splits = share(len(z), block["INNER"], most)
        shape = (len(z), self.components, self.columns)
        partial = torch.empty((splits, 2, *shape[1:]), dtype=torch.float32, device=z.device)
        launch(
            gmm_dot_by_components_kernel, (tiles * splits,),
            z, logvar, self.centre, weight, partial, shape, *map(strides_of, (z, logvar)), rows_per_program,
            PRECISION=self.precision, enable_fp_fusion=True, **block,
        )  # fmt: skip
        return partial.sum(0)
