"""The content of data files before scaling: arrays, their labels, and the range of their values."""

from __future__ import annotations

import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

AT_ONCE = 2**22  # numbers in float64 at a time

# Errors that numpy, zipfile and torch raise on truncated, empty or foreign files, and on files with a wrong size in the
# header. torch's zip reader raises RuntimeError; weights_only refuses code by pickle.UnpicklingError.
BROKEN = (
    ValueError, EOFError, LookupError, RuntimeError, MemoryError, OverflowError, TypeError, AttributeError,
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
)  # fmt: skip


class Lazy:
    """An array [N, ...] whose rows are read when they are indexed: by a number, a slice, or an array of numbers.

    A subclass sets `shape` and `dtype` and defines `read`. A data set of any size can be one, because it takes a few
    bytes of memory per row. An object is sent to other processes, so it keeps no open file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The rows [n, ...].

        Raises:
            UserError: a row cannot be read; the message names the file.
        """
        raise NotImplementedError

    @property
    def identity(self) -> bytes:
        """Bytes that tell this array from others without reading its rows, such as the names of its files."""
        return b""

    def name(self, row: int) -> str:
        """The name of a row in error messages."""
        return f"row {row}"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            return self.read(np.arange(*key.indices(len(self))))
        rows = np.asarray(key)
        return self.read(rows) if rows.ndim else self.read(rows[None])[0]


class Laid(Lazy):
    """A lazy array in another layout: `change` maps rows [n, ...] to rows."""

    def __init__(self, source: Lazy, change: Callable[[np.ndarray], np.ndarray]):
        self.source, self.change, self.dtype = source, change, source.dtype
        self.shape = (len(source), *change(np.empty((1, *source.shape[1:]), source.dtype)).shape[1:])

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.change(self.source.read(rows))

    @property
    def identity(self) -> bytes:
        return self.source.identity

    def name(self, row: int) -> str:
        return self.source.name(row)


def laid(values: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """An array in another layout; `change` must be a function that other processes can import."""
    return Laid(values, change) if isinstance(values, Lazy) else change(values)


def blocks(values: Any) -> Iterator[np.ndarray]:
    """The rows of an array in blocks of bounded size."""
    count = max(1, AT_ONCE // math.prod(values.shape[1:]))
    for first in range(0, len(values), count):
        yield values[first : first + count]


@dataclass(frozen=True)
class Span:
    """The range of an array in the units of its file, before resizing turns whole numbers into fractions."""

    integer: bool
    low: float
    high: float

    @staticmethod
    def of(values: np.ndarray) -> Span:
        """The span of a numeric array that is not empty."""
        low, high = values.min(), values.max()
        if values.dtype.kind == "f":
            return Span(False, float(low), float(high))
        return Span(True, int(low), int(high))

    @staticmethod
    def of_blocks(blocks: Iterable[np.ndarray], dtype: np.dtype) -> Span:
        """The span of blocks of rows. The pass ends early if unsigned numbers use their highest bit, because only the
        number of bits matters then: most pictures are known as bytes from the first block."""
        spans: list[Span] = []
        for block in blocks:
            spans = [Span.joined([*spans, Span.of(block)])]
            if dtype.kind == "u" and spans[0].high >= (most := int(np.iinfo(dtype).max)) // 2 + 1:
                return Span(True, 0, most)
        return spans[0]

    @staticmethod
    def joined(spans: Iterable[Span]) -> Span:
        spans = list(spans)
        low, high = min(span.low for span in spans), max(span.high for span in spans)
        return Span(all(span.integer for span in spans), low, high)

    def __str__(self) -> str:
        if self.integer:
            return f"whole numbers from {self.low} to {self.high}"
        return f"numbers from {self.low:.4g} to {self.high:.4g}"


@dataclass(frozen=True)
class Part:
    """Values [N, ...], in memory or `Lazy`, and labels [N] or None; the span if it differs from that of the values."""

    values: Any
    labels: np.ndarray | None = None
    span: Span | None = None


@dataclass(frozen=True)
class Held:
    """The parts of a data set by name ("train", and optionally "validation" and "test"), the names of labels 0, 1, ...
    or None, and notes for the report."""

    parts: dict[str, Part]
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to stand in parentheses."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
