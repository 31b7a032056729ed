"""The content of data files before scaling: arrays, their labels, and the range of their values."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

# Errors that numpy, zipfile and torch raise on truncated, empty or foreign files, and on files with a wrong size in the
# header. torch's zip reader raises RuntimeError; weights_only refuses code by pickle.UnpicklingError.
BROKEN = (
    ValueError, EOFError, LookupError, RuntimeError, MemoryError, OverflowError, TypeError, AttributeError,
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
)  # fmt: skip


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
    """Values [N, ...] and labels [N] or None; the span if it differs from that of the values."""

    values: np.ndarray
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
