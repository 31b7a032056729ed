"""Interleaved timing, on a GPU, of candidates for the table of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench import device, tune, workers
from bench.bench_gmm_log_prob import inputs
from bench.gpu import card, release
from bench.timing import Contender
from fastkl.kernels import _launch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROWS, COLUMNS = 32768, 1024  # 128 MiB of float32 per tensor, more than any cache
MIXTURE = (65536, 1024, 64)
SMALL, SMALL_MIXTURE = (16, 64), (64, 16, 16)
PRECISION = "tf32x3"
GAIN = 0.98  # a new tile must take less than this share of the present tile's time
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2, "": 1e-3}  # difference of two tiles' results, over the largest value


def dot_candidates(kernel: str) -> list[tuple[int, ...]]:
    """(rows of a tile, most columns, terms summed at a time, warps, stages) of one of gmm_dot's kernels."""
    if kernel == "forward":
        found = itertools.product((64, 128), (32, 64, 128), (16, 32), ((4, 2), (8, 3)))
    else:
        found = itertools.product((64, 128), (64,), (16, 32), ((4, 1), (4, 3), (8, 3)))
    return [(rows, columns, inner, *rest) for rows, columns, inner, rest in found]


class Tuning:
    """The entries of the table to tune, and their candidates, of which the first is the present tile."""

    def __init__(self, ops: list[str], dtypes: list[str], tiles: list[tuple], small: bool, jobs: int) -> None:
        self.ops, self.dtypes, self.tiles, self.small, self.jobs = ops, dtypes, tiles, small, jobs
        self.flush: device.Flush | None = None

    def entries(self) -> Iterator[tuple[str, str, Any]]:
        """(op, dtype's name, key of the table's entry); gmm_dot has a key for each kernel and an empty dtype."""
        for op in self.ops:
            if op == tune.GMM_DOT:
                yield from ((op, "", kernel) for kernel in tune.table_of(op))
            else:
                yield from ((op, name, tune.DTYPES[name].itemsize) for name in self.dtypes)

    def candidates(self, op: str, key: Any) -> list[tuple[int, ...]]:
        before = tune.table_of(op)[key]
        if op == tune.GMM_DOT:
            found = dot_candidates(key)[: 1 if self.small else None]
        else:
            found = self.tiles or tune.candidates(key)
        return list(dict.fromkeys([before, *found]))

    def compile_ahead(self, seconds: float) -> None:
        """Compile every candidate into Triton's cache, at full size, because the alignment of strides is part of it."""
        if not CUDA or self.jobs < 2:
            return
        tasks = [(*entry, tile) for entry in self.entries() for tile in self.candidates(entry[0], entry[2])]
        workers.report("candidates", workers.ahead(compile_one, tasks, self.jobs, seconds), len(tasks))

    def race(self, op: str, name: str, key: Any) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
        """(a row for each candidate, the best tile) of one entry."""
        self.flush = self.flush or device.Flush(DEVICE)
        table = tune.table_of(op)
        before, turns, notes, expected = table[key], {}, {}, None
        call = launches(op, name, self.small)
        facts = {"card": card(), "op": op, "dtype": name or key}
        try:
            for tile in self.candidates(op, key):
                step = with_tile(table, key, tile, call)
                try:
                    found = results(step)
                    expected = expected or found
                    if note := differs(found, expected, ALLOWED[name]):
                        notes[tile] = note
                        continue
                    made = device.turns_of(step, DEVICE)
                    turns |= {(tile, direction): made[direction] for direction in ("forward", "backward")}
                except Exception as error:  # for instance too much shared memory
                    notes[tile] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            times = device.measure(turns, self.flush, 3 if self.small else 15, 3.0)
        finally:
            table[key] = before
            _launch.forget()
            release()
        rows, sums = [], {}
        for tile in dict.fromkeys(tile for tile, _ in times):
            forward, backward = times[tile, "forward"], times[tile, "backward"]
            sums[tile] = forward.median + backward.median
            row = {**facts, "tile": text(tile), "forward_ms": forward.median, "backward_ms": backward.median}
            rows.append({**row, "how": forward.how})
        rows.sort(key=lambda row: row["forward_ms"] + row["backward_ms"])
        rows += [{**facts, "tile": text(tile), "note": note} for tile, note in notes.items()]
        fastest = min(sums, key=sums.get, default=before)
        gains = before not in sums or sums.get(fastest, 0.0) < GAIN * sums[before]
        return rows, fastest if gains else before


def launches(op: str, name: str, small: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The launchers' calls, forward and backward."""
    if op != tune.GMM_DOT:
        made = tune.calls(op, tune.DTYPES[name], DEVICE, SMALL if small else (ROWS, COLUMNS))
        return made["fwd"][1], made["bwd"][1]
    from fastkl.kernels.mixture import gmm_dot

    z, logits, means, logvars = (t.detach() for t in inputs(DEVICE, *(SMALL_MIXTURE if small else MIXTURE)))
    # The form in which gmm_log_prob calls the launcher, for a mixture shared by all rows.
    given = (z, None, logits[None], means[None], logvars[None], None)
    lp = gmm_dot.fwd(*given, "point", PRECISION)
    dlp, outputs = torch.ones(len(z), device=DEVICE), [None if t is None else torch.empty_like(t) for t in given]

    def backward() -> list[Tensor | None]:
        gmm_dot.bwd(dlp, lp, given, outputs, "point", PRECISION)
        return outputs

    return lambda: gmm_dot.fwd(*given, "point", PRECISION), backward


def with_tile(table: dict, key: Any, tile: tuple[int, ...], call: tuple[Callable, Callable]) -> Contender:
    """The calls, with this tile in the table."""

    def run(which: Callable) -> Any:
        table[key] = tile
        _launch.forget()
        return which()

    return Contender(lambda: run(call[0]), lambda _: run(call[1]))


def results(step: Contender) -> list[Tensor]:
    """All tensors that a step computes."""
    forward = step.forward()
    return [x for x in tree_leaves((forward, step.backward(forward))) if isinstance(x, Tensor)]


def differs(found: list[Tensor], expected: list[Tensor], allowed: float) -> str:
    """The reason why a candidate is not timed, or "": tiles may differ only by the order of sums."""
    for number, (a, b) in enumerate(zip(found, expected)):
        scale = b.double().abs().max()
        error = (a.double() - b.double()).abs().max()
        if not error <= allowed * scale:
            return f"result {number} differs by {error:.1e}, largest value {scale:.1e}"
    return ""


def compile_one(task: tuple[str, str, Any, tuple[int, ...]]) -> None:
    op, name, key, tile = task
    results(with_tile(tune.table_of(op), key, tile, launches(op, name, False)))
    release()


def text(tile: tuple[int, ...]) -> str:
    return " x ".join(map(str, tile))


def show(rows: list[dict[str, Any]], op: str, of: str, best: tuple[int, ...]) -> None:
    """Print the fastest candidates and the dropped ones."""
    print(f"\n{op}, {of}: tile, ms forward and backward, on {rows[0]['card']}")
    for row in [row for row in rows if "note" not in row][:4]:
        chosen = "  <- the table" if row["tile"] == text(best) else ""
        print(f"{row['tile']:>24}  {row['forward_ms']:.4g}  {row['backward_ms']:.4g}  {row['how']}{chosen}")
    for row in rows:
        if "note" in row:
            print(f"{row['tile']:>24}  {row['note']}")
    print(end="", flush=True)
