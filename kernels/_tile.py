"""Device functions for tiles of strided tensors, rows by columns: their addresses, and the share of a program.

shape is (rows, inner rows, columns, inner columns), strides (outer row, inner row, outer column, inner column), as
kernels._layout has them; NESTED gives the axes with an outer dimension: 1 the rows, 2 the columns, 3 both.
"""

import triton
import triton.language as tl


@triton.jit
def offsets(index, inner, outer_stride, inner_stride, NESTED: tl.constexpr):
    """Offsets in int64, for tensors of more than 2^31 elements. A nested axis is two dimensions in one index."""
    if NESTED:
        outer = index // inner
        return outer.to(tl.int64) * outer_stride + (index - outer * inner).to(tl.int64) * inner_stride
    return index.to(tl.int64) * inner_stride


@triton.jit
def row_offsets(row, shape, strides, NESTED: tl.constexpr):
    return offsets(row, shape[1], strides[0], strides[1], NESTED % 2 == 1)


@triton.jit
def column_offsets(column, shape, strides, NESTED: tl.constexpr):
    return offsets(column, shape[3], strides[2], strides[3], NESTED >= 2)


@triton.jit
def tile(row, column, shape, strides, NESTED: tl.constexpr):
    """Element offsets of a tile of rows by columns."""
    return elements(row[:, None], column[None, :], shape, strides, NESTED)


@triton.jit
def elements(row, column, shape, strides, NESTED: tl.constexpr):
    """As `tile`, for indices that already have both dimensions (the columns may differ by row)."""
    return row_offsets(row, shape, strides, NESTED) + column_offsets(column, shape, strides, NESTED)


@triton.jit
def load_rows(pointer, row, shape, strides, NESTED: tl.constexpr):
    """One value for each row, [ROWS, 1]; 0 for rows past the end."""
    return tl.load(pointer + row_offsets(row, shape, strides, NESTED), row < shape[0], other=0.0)[:, None]


@triton.jit
def run_of_columns(columns, columns_per_program, splits, rows, ROWS: tl.constexpr):
    """(rows, first column, last column, offsets of sums [splits, rows]) of one of `splits` programs that share rows."""
    split = tl.program_id(0) % splits
    row = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    first = split * columns_per_program
    return row, first, tl.minimum(first + columns_per_program, columns), split.to(tl.int64) * rows + row


@triton.jit
def run_of_rows(rows, rows_per_program, column_blocks):
    """(first row, last row, group of rows, block of columns) of a program."""
    group = tl.program_id(0) // column_blocks
    first = group * rows_per_program
    return first, tl.minimum(first + rows_per_program, rows), group, tl.program_id(0) % column_blocks


@triton.jit
def store_columns(pointer, sums, column, shape, strides, group, group_stride, NESTED: tl.constexpr):
    """One value for each column, `group_stride` apart for each group of rows."""
    at = column_offsets(column, shape, strides, NESTED) + group.to(tl.int64) * group_stride
    tl.store(pointer + at, sums, mask=column < shape[2])
