"""Choose the tiles of the elementwise kernels and of gmm_dot: kernels/_tuned.py.

    python -m bench.tune                              # every op, float32 and bfloat16
    python -m bench.tune --op rsample_kl --dtype bfloat16
    python -m bench.tune --table tuned.py --out tune.csv      # writes the table to another file than --write
    python -m bench.tune --write                      # writes the best tiles to kernels/_tuned.py

On a GPU candidates are compiled ahead, in several processes, and then timed interleaved at sizes larger than any cache:
by CUDA graphs, with the L2 cache flushed, as medians. A candidate whose results differ from those of the table is
dropped. An entry of the table changes only for a gain of 2 %. Without a GPU candidates of the elementwise kernels are
compiled for --target and ranked by the ESTIMATE of bench/estimate.py; those that spill registers come last.
"""

from __future__ import annotations

import argparse
import ast
import collections
import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.estimate import Code, compiled, estimate
from bench.store import cores, rounded
from fastkl.reference import Stream

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels" / "_tuned.py"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPE = (4096, 512)
NO_BOUNDS = ("logvar", float("-inf"), float("inf"), False)
GMM_DOT = "gmm_dot"
COLUMNS = ["card", "op", "dtype", "tile", "forward_ms", "backward_ms", "how", "note"]
Best = dict[str, dict[Any, tuple[int, ...]]]


def calls(
    op: str, dtype: torch.dtype, device: str, shape: tuple[int, int] = SHAPE
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Direction -> (tensors moved, a call of the launcher), of every elementwise kernel."""

    from fastkl.ops._register import LOADERS

    kernels = sys.modules[LOADERS[f"{op}_fwd"][0]().__module__]
    generator = torch.Generator(device).manual_seed(0)
    a, b, c = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(3))
    rows, columns = (torch.randn(size, device=device, generator=generator) for size in shape)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    da, db, dc = (torch.empty_like(a) for _ in range(3))
    q, dq, none, alone = (a, b), (da, db), (None, None), (1, *NO_BOUNDS)
    drawing, choice = (*alone, None, Stream.POSTERIOR), (0.7, False, 1, Stream.GUMBEL)
    settings = {
        "bernoulli_log_prob": (2, (*q, 1), 3, (rows, *q, da, None, 1)),
        "kl_normal": (2, (*q, *none, *alone), 4, (rows, *q, *none, *dq, *none, *alone)),
        "kl_normal_per_dim": (2, (*q, *none, *alone), 4, (columns, *q, *none, *dq, *none, *alone)),
        "normal_log_prob": (3, (*q, c, 1), 6, (rows, *q, c, *dq, dc, 1)),
        "rsample_kl": (
            3, (*q, *none, None, seed, *drawing),
            5, (c, rows, *q, *none, None, seed, *dq, *none, *drawing),
        ),
        # Not in the table: these have fixed tiles, or those of another op.
        "gumbel_softmax": (2, (a, None, seed, *choice), 3, (b, None, a, None, seed, da, None, *choice)),
        "rsample_normal": (3, (*q, None, seed, *drawing), 4, (c, *q, None, seed, *dq, *drawing)),
        "wasserstein2_normal": (2, (*q, *none, *alone), 4, (rows, *q, *none, *dq, *none, *alone)),
    }  # fmt: skip
    forward, fwd, backward, bwd = settings[op]
    return {"fwd": (forward, lambda: kernels.fwd(*fwd)), "bwd": (backward, lambda: kernels.bwd(*bwd))}


def candidates(itemsize: int) -> list[tuple[int, int]]:
    """(elements of a tile, warps), with one to four 16-byte accesses per thread and tensor."""
    return [(n * 16 // itemsize * 32 * warps, warps) for warps in (2, 4, 8) for n in (1, 2, 4)]


def table_of(op: str) -> dict[Any, tuple[int, ...]]:
    """The table's mutable entries for an op: by the bytes of an element, or by kernel for gmm_dot."""
    from fastkl.kernels import _tuned

    return _tuned.GMM_DOT if op == GMM_DOT else _tuned.TILES[op]


def rank(op: str, dtype: torch.dtype, tiles: list[tuple[int, int]], target: str) -> list[tuple]:
    """Estimates (spills, seconds per element both ways, tile, {direction: Code}), the best first."""
    from fastkl.kernels._launch import forget

    table, results = table_of(op), []
    before = table[dtype.itemsize]
    for tile in tiles:
        table[dtype.itemsize] = tile
        seconds, codes = 0.0, {}
        for direction, (tensors, call) in calls(op, dtype, "cpu").items():
            forget()
            codes[direction] = compiled(call, target)
            seconds += estimate(tensors, dtype.itemsize, codes[direction])
        results.append((sum(c.spills for c in codes.values()), seconds, tile, codes))
    table[dtype.itemsize] = before
    forget()
    # Ties keep the present tile.
    return sorted(results, key=lambda result: (result[0] > 0, round(result[1] * 1e15), result[2] != before))


def written(source: str, best: Best) -> str:
    """The source of kernels/_tuned.py with the best tiles."""
    for node in reversed([node for node in ast.parse(source).body if isinstance(node, ast.Assign)]):
        name, table = node.targets[0].id, ast.literal_eval(node.value)
        if name == "GMM_DOT":
            table.update(best.get(GMM_DOT, {}))
            entries = "".join(f'    "{kernel}": {tile},\n' for kernel, tile in table.items())
        else:
            for op, tiles in best.items():
                table.get(op, {}).update(tiles)
            entries = "".join(f'    "{op}": {dict(sorted(tiles.items()))},\n' for op, tiles in sorted(table.items()))
        lines = source.splitlines(keepends=True)
        source = "".join(lines[: node.lineno - 1]) + f"{name} = {{\n{entries}}}\n" + "".join(lines[node.end_lineno :])
    return source


def estimated(given: argparse.Namespace) -> Best:
    """Rank candidates by the estimate from their compiled code."""
    print(f"ESTIMATE, not timed ({given.target})")
    print("time = max(bytes / 3.35e12 * max(1, 32 KiB / in flight), instructions / 2.96e13) seconds an element")
    best: Best = collections.defaultdict(dict)
    for op in given.op:
        for name in given.dtype:
            if op == GMM_DOT:
                print(f"\n{op}: its tiles are not estimated; run on a GPU to time them")
                break
            dtype = DTYPES[name]
            ranked = rank(op, dtype, given.tiles or candidates(dtype.itemsize), given.target)
            best[op][dtype.itemsize] = ranked[0][2]
            print(f"\n{op}, {name}: tile x warps, picoseconds an element both ways")
            for spills, seconds, (elements, warps), codes in ranked:
                spilled = f", {spills} bytes spilled" if spills else ""
                print(f"{elements:>6} x {warps}  {seconds * 1e12:6.2f}  {described(codes)}{spilled}", flush=True)
    return best


def described(codes: dict[str, Code]) -> str:
    return "; ".join(
        f"{way} {c.instructions:.1f} instructions, {c.registers} registers, {c.in_flight / 1024:.0f} KiB in flight"
        for way, c in codes.items()
    )


def timed(given: argparse.Namespace) -> Best:
    """Time candidates, and write all of them to --out."""
    from bench import tune_timed

    found = tune_timed.Tuning(given.op, given.dtype, given.tiles, given.small, given.jobs)
    deadline = time.monotonic() + given.seconds
    print(f"Timed on {tune_timed.card()}", flush=True)
    found.compile_ahead(0.5 * given.seconds)
    best: Best = collections.defaultdict(dict)
    with given.out.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        out.writeheader()
        for op, name, key in found.entries():
            if time.monotonic() > deadline:
                print(f"{op}, {name or key}: no time left", flush=True)
                continue
            try:
                rows, best[op][key] = found.race(op, name, key)
            except Exception as error:  # for instance a device error; earlier results are kept
                print(f"{op}, {name or key}: FAILED {type(error).__name__}: {error}".splitlines()[0][:300], flush=True)
                given.failed = True
                continue
            out.writerows({column: rounded(value) for column, value in row.items()} for row in rows)
            file.flush()
            tune_timed.show(rows, op, name or key, best[op][key])
            if given.table:
                given.table.write_text(written(TABLE.read_text(), best))
    return best


def main(arguments: list[str] | None = None) -> int:
    from fastkl.kernels import _tuned

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ops = [*_tuned.TILES, GMM_DOT]
    parser.add_argument("--op", choices=ops, nargs="+", default=ops)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--target", default="sm_90", help="target of compilation without a GPU: sm_80, sm_90, ...")
    parser.add_argument("--tile", nargs="+", metavar="ELEMENTSxWARPS", help="only these candidates, such as 2048x4")
    parser.add_argument("--out", type=Path, default=Path(os.devnull), help="a CSV file of all timings")
    parser.add_argument("--table", type=Path, help="write the table to this file")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no entry after this many seconds")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes that compile ahead; 1: none")
    parser.add_argument("--small", action="store_true", help="time small tensors, in the interpreter without a GPU")
    parser.add_argument("--write", action="store_true", help="write the best tiles to kernels/_tuned.py")
    given = parser.parse_args(arguments)
    given.failed = False
    given.tiles = [tuple(map(int, tile.split("x"))) for tile in given.tile or []]
    best = timed(given) if torch.cuda.is_available() or given.small else estimated(given)
    for path in [given.table] * bool(given.table) + [TABLE] * given.write:
        path.write_text(written(TABLE.read_text(), best))
        print(f"\nwritten: {path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path}")
    return int(given.failed)


if __name__ == "__main__":
    if not torch.cuda.is_available() and "--small" not in sys.argv:
        os.environ["TRITON_INTERPRET"] = "0"  # set before Triton is imported, to compile candidates
    sys.exit(main())
