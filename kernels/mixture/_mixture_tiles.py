"""Tile sizes of the shared-mixture kernels: rows and components per thread, warp and program.

A tile of rows x components is [own, TERMS, groups, LANES]; see kernels._mixture.
"""

from __future__ import annotations

import math

import torch

from fastkl.kernels._layout import OLD_COMPILER, PROGRAMS, SPILLS_A_FEW, cdiv, next_power_of_2, registers, share
from fastkl.kernels.mixture._mixture_prepare import STEP

# Limit in bytes for the partial sums of all splits together, unless a single split takes more.
PARTIAL_BYTES = 32 << 20
ENOUGH = 264  # programs: two per multiprocessor of a large GPU

# Form of the density and kernel -> (own, TERMS) of a thread, as many as its registers hold: `own` of rows or
# components, and TERMS of the other, which the kernel sums over. Six for float32, then six for float64: rows that are
# "" (whole runs of 16 bytes), "rows", "tail" (see `scattered`), and the same three with logits per row.
# fmt: off
THREADS = {
    ("point", "forward"):        "2x16 2x16 2x16 2x8  2x8  2x8  | 2x8  2x8  2x8  1x8  1x8  1x8",
    ("point", "rows"):           "2x16 2x8  1x8  1x8  1x4  1x2  | 1x8  1x8  1x4  1x4  1x2  1x2",
    ("point", "few rows"):       "2x16 2x16 1x8  1x8  1x8  1x2  | 1x8  1x8  1x4  1x4  1x4  1x2",
    ("point", "components"):     "2x16 2x8  2x8  2x8  1x8  1x8  | 2x8  1x8  1x8  1x8  1x4  1x4",
    ("convolved", "forward"):    "2x8  2x8  2x8  1x8  1x8  1x8  | 1x4  1x4  1x4  1x2  1x2  1x2",
    ("convolved", "rows"):       "2x8  1x8  1x8  1x2  1x2  1x2  | 1x2  1x2  1x2  1x2  1x2  1x2",
    ("convolved", "few rows"):   "2x8  1x8  1x8  1x2  1x2  1x2  | 1x2  1x2  1x2  1x2  1x2  1x2",
    ("convolved", "components"): "2x8  1x8  1x8  1x8  1x8  1x8  | 1x4  1x4  1x4  1x2  1x2  1x2",
    ("expected", "forward"):     "2x16 2x8  2x8  1x4  1x2  1x2  | 1x8  1x4  1x4  1x2  1x2  1x2",
    ("expected", "rows"):        "2x4  1x8  1x8  1x4  1x2  1x2  | 1x8  1x4  1x4  1x2  1x2  1x2",
    ("expected", "few rows"):    "2x8  1x8  1x8  1x4  1x2  1x2  | 1x8  1x4  1x4  1x2  1x2  1x2",
    ("expected", "components"):  "2x8  1x8  1x8  1x8  1x4  1x4  | 1x8  1x4  1x4  1x4  1x2  1x2",
}
# fmt: on
SCATTERED = ("", "rows", "tail")


def thread(
    dtype: torch.dtype, form: str, kind: str, *, few: bool, own: bool, scattered: str, given: bool
) -> tuple[int, int]:
    """(own, TERMS) of a thread."""
    table = THREADS[form, "few rows" if few and kind == "rows" else kind].replace("|", "").split()
    place = 6 * (dtype == torch.float64) + 3 * own + SCATTERED.index(scattered)
    owned, terms = map(int, table[place].split("x"))
    tensors = (
        own + given
    )  # of N x K; such a tensor decides the tile's layout, which gives neighbours to different threads
    if OLD_COMPILER and (tensors == 2 or (kind != "forward" and (tensors or (scattered and kind == "rows")))):
        return 1 if kind == "components" else owned, max(2, terms // 2)
    return owned, terms


def blocks(
    dtype: torch.dtype, form: str, kind: str, rows: int, components: int, *, own: bool, scattered: str,
    given: bool = False,
) -> dict:  # fmt: skip
    """The tile of rows x components for the forward kernel, the one by "rows" or the one by "components".

    If few rows or components give few programs, the warps of a program share a sum, which saves partial sums in memory.
    `own`: there is an N x K tensor, logits per row or an output; `given`: there is another, or the gradient of one.
    """
    few = cdiv(rows, 64) < PROGRAMS // 2
    owned, terms = thread(dtype, form, kind, few=few, own=own, scattered=scattered, given=given)
    if kind == "components":
        # Programs with few components need fewer splits of the rows, and so write fewer partial sums. But every program
        # reads its rows of z, so this pays only with few programs, where L2 is not the bottleneck.
        lanes = 4 if dtype == torch.float64 or rows * components < 2 * ENOUGH * 512 * terms else 16
        groups = min(256 // lanes, max(32 // lanes, next_power_of_2(cdiv(rows, terms))))
        tile = {"ROWS": terms * groups, "COMPONENTS": owned * lanes}
    else:
        lanes = 32
        groups = min(4 if own else 8, next_power_of_2(cdiv(components, terms))) if few else 1
        tile = {"ROWS": owned * lanes, "COMPONENTS": terms * groups}
    held = registers(255) if (OLD_COMPILER or SPILLS_A_FEW or dtype == torch.float64) and kind == "rows" else {}
    if few or kind == "components":
        held = registers(255)  # few programs each have a multiprocessor to themselves, as does one of eight warps
    elif scattered:
        held = registers(168 if kind == "forward" and form != "convolved" else 255)
    return {**tile, "TERMS": terms, "LANES": lanes, "num_warps": groups * lanes // 32, **held}


def scattered(*tensors: torch.Tensor | None) -> str:
    """The kind of rows: "tail" if each row's last step of four is masked, "rows" if rows may be unaligned, else "".

    Unless it is "", a thread keeps one pointer per element instead of one per 16 bytes, so full tiles would spill.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].shape[1] % STEP:
        return "tail"
    return "rows" if any(tensor.stride(0) % 16 or tensor.stride(1) != 1 for tensor in given) else ""


def split(total: int, block: int, others: int, partial_bytes: int, read_bytes: float = math.inf) -> tuple[int, int]:
    """(length, count): `total` split so that, with `others` programs per part, the GPU is full and partial sums are
    bounded. They are also bounded by `read_bytes`, unless that leaves too few programs: time matters more than traffic.
    """
    partial_bytes = max(1, partial_bytes)
    enough = max(cdiv(ENOUGH, others), read_bytes / partial_bytes)
    return share(total, block, int(min(cdiv(PROGRAMS, others), enough, max(1, PARTIAL_BYTES // partial_bytes))))
