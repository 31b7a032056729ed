"""What files hold, before anything is decided about it: arrays, their labels, and the range of their values."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

# What numpy, zipfile and torch raise on files that are cut short, empty, of another kind, or that lie about their size.
# A RuntimeError also covers torch's zip reader; pickle.UnpicklingError is how weights_only refuses code.
BROKEN = (
    ValueError, EOFError, LookupError, RuntimeError, MemoryError, OverflowError, TypeError, AttributeError,
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """The range of an array as its file has it: resizing makes fractions of whole numbers, and tells less."""

    integer: bool
    low: float
    high: float

    @staticmethod
    def of(values: np.ndarray) -> Span:
        """Of an array of numbers that has elements."""
        low, high = values.min(), values.max()
        if values.dtype.kind == "f":
            return Span(False, float(low), float(high))
        return Span(True, int(low), int(high))

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
    """Values [N, ...] and labels [N] or None; the range where it is not that of the values as they are."""

    values: np.ndarray
    labels: np.ndarray | None = None
    span: Span | None = None


@dataclass(frozen=True)
class Held:
    """The parts of a data set by name ("train", and "validation" and "test" where they are given), the names of labels
    0, 1, ... or None, and what a reader of the report must know."""

    parts: dict[str, Part]
    names: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to stand in parentheses."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
