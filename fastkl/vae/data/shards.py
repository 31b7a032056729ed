"""Rows of .npy files, read when they are used: one file, or a folder of files that continue each other."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np

from fastkl.vae.data.arrays import BROKEN, Lazy, first_line
from fastkl.vae.errors import UserError


class Shards(Lazy):
    """The rows of .npy files one after the other.

    Rows are read, not memory-mapped: a file that is cut during the training then raises an error, where a mapping would
    end the process by a signal. No file stays open, so their number is not limited.

    Args:
        paths: the files, whose arrays have one dtype and, after the first dimension, one shape.
        option: the option that gave the files, for error messages.

    Raises:
        UserError: a file is truncated, foreign, in Fortran order, or does not fit the first; the message names it.
    """

    def __init__(self, paths: list[Path], option: str):
        self.paths, self.option = paths, option
        heads = [self.head(path) for path in paths]
        self.dtype, self.offsets = heads[0].dtype, [head.offset for head in heads]
        for path, head in zip(paths, heads):
            if (head.dtype, head.shape[1:]) != (self.dtype, heads[0].shape[1:]):
                expected = f"rows {list(heads[0].shape[1:])} of {self.dtype}, as in {paths[0].name}"
                raise UserError(f"{option} {path}: expected {expected}, got {list(head.shape[1:])} of {head.dtype}")
        self.ends = np.array(list(itertools.accumulate(len(head) for head in heads)))
        self.shape = (int(self.ends[-1]), *heads[0].shape[1:])

    def head(self, path: Path) -> np.memmap:
        """The file as a mapping, which checks its length against its header."""
        try:
            head = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise UserError(f"{self.option} {path}: cannot be read ({error.strerror or first_line(error)})") from None
        except BROKEN as error:
            what = "truncated, or not a .npy file of plain arrays"
            raise UserError(f"{self.option} {path}: {what} ({first_line(error)})") from None
        if not isinstance(head, np.memmap) or not head.ndim:
            raise UserError(f"{self.option} {path}: expected one array of rows")
        if head.ndim > 1 and not head.flags.c_contiguous:
            raise UserError(f"{self.option} {path}: its rows are not contiguous: save it by np.ascontiguousarray")
        return head

    def name(self, row: int) -> str:
        shard = int(np.searchsorted(self.ends, row, side="right"))
        return f"row {row - (self.ends[shard - 1] if shard else 0)} of {self.paths[shard].name}"

    def read(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        size = self.dtype.itemsize * math.prod(self.shape[1:])
        bytes_of = found.view(np.uint8).reshape(len(rows), size)
        which = np.searchsorted(self.ends, rows, side="right")
        for shard in np.unique(which):
            path, first = self.paths[shard], self.ends[shard - 1] if shard else 0
            try:
                with open(path, "rb", buffering=0) as file:
                    for place in np.flatnonzero(which == shard):
                        file.seek(self.offsets[shard] + int(rows[place] - first) * size)
                        if file.readinto(bytes_of[place]) != size:
                            raise UserError(f"{self.option} {path}: truncated at row {rows[place] - first}")
            except OSError as error:
                raise UserError(f"{self.option} {path}: cannot be read ({error.strerror})") from None
        return found

    @property
    def identity(self) -> bytes:
        return repr([(path.name, int(end)) for path, end in zip(self.paths, self.ends)]).encode()
