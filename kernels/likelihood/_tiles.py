"""The tile of the likelihood kernels."""

from fastkl.kernels._layout import next_power_of_2
from fastkl.kernels._tuned import TILES

# Where rows cannot be read 16 bytes at a time, every element has an address and a mask.
ODD_TILE = 1024


def blocks(op: str, rows: int, columns: int, itemsize: int) -> dict[str, int]:
    """A tile of rows x columns: short rows packed many to a program, long rows in runs."""
    # 16 for each of 128 threads: more of them cost registers, and with these the programs that fit in.
    elements, warps = TILES[op][itemsize]
    elements = elements if columns % 16 == 0 else ODD_TILE
    block_columns = min(next_power_of_2(columns), elements)
    return {"ROWS": min(elements // block_columns, next_power_of_2(rows)), "COLUMNS": block_columns, "num_warps": warps}
