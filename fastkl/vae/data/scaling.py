"""Layout, scale and likelihood of data, inferred from the numbers of a file and described for the user."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkl.vae.data.arrays import AT_ONCE, Lazy, Part, Span, blocks, laid
from fastkl.vae.data.image_sets import Crops, Whole
from fastkl.vae.errors import UserError
from fastkl.vae.likelihood import COUNTS, DISCRETE, LEVELS, PIXELS

FEW = 4  # the most channels of a picture
DEPTHS = (8, 10, 12, 14, 16, 32)  # bits of a pixel
ROUNDING = 1e-5  # tolerance of the range [0, 1]
# Limits of the rows that standardise data outside the memory: rows, and numbers in all, but not fewer than the last.
SAMPLED, SAMPLED_NUMBERS, LEAST_SAMPLED = 10_000, 2**26, 100


@dataclass(frozen=True)
class Scaling:
    """The map from the numbers of a file to the numbers of the model, and back.

    Pixels: x / deviation, clamped to [0, 1]. Counts: unchanged. Others: (x - mean) / deviation, by moments of the
    training data, one for each feature of a vector or one for all pixels.
    """

    likelihood: str
    mean: np.ndarray
    deviation: np.ndarray
    low: float = 0.0  # the range of a value in the file: that of its pixels, or else of the data
    high: float = 1.0

    def apply(self, values: np.ndarray, rows: np.ndarray | None = None) -> Tensor:
        """The scaled values. `rows`: their rows in the file, for error messages.

        Raises:
            UserError: a standardised value overflows.
        """
        if self.likelihood in PIXELS:
            return divided(values, float(self.deviation))
        return standardised(values, self.mean, self.deviation, rows)

    @property
    def levels(self) -> int:
        """The number of levels of pixels that were whole numbers."""
        return int(self.deviation) + 1 if self.likelihood in PIXELS else 0

    @property
    def peak(self) -> float:
        """The range of a value of an image in the numbers of the model, to which its errors are compared."""
        return (self.high - self.low) / float(self.deviation)

    @property
    def signed(self) -> tuple[float, float]:
        """(a, b) for images: a x + b maps the range of a value, in the numbers of the model, to [-1, 1]."""
        return 2 / self.peak, 2 * (float(self.mean) - self.low) / (self.high - self.low) - 1

    def undo(self, x: Tensor) -> Tensor:
        mean, deviation = (torch.from_numpy(np.asarray(each)).to(x) for each in (self.mean, self.deviation))
        return x * deviation + mean

    def resize(self, values: Tensor, size: int) -> Tensor:
        """Images with `size` pixels a side (0: as they are), rounded to the levels of the file if the levels count."""
        values = resized(values, size)
        return (values * (self.levels - 1)).round() / (self.levels - 1) if self.likelihood in DISCRETE else values

    def state_dict(self) -> dict[str, Any]:
        mean, deviation = (torch.from_numpy(np.array(each)) for each in (self.mean, self.deviation))
        bounds = {"low": self.low, "high": self.high}
        return {"likelihood": self.likelihood, "mean": mean, "deviation": deviation, **bounds}

    @staticmethod
    def of_state(state: dict[str, Any]) -> Scaling:
        bounds = (state.get(name, math.nan) for name in ("low", "high"))  # checkpoints of 0.1.0 have none
        return Scaling(state["likelihood"], state["mean"].numpy(), state["deviation"].numpy(), *bounds)


def resized(values: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W], or each frame of videos [N, C, T, H, W], with `size` pixels a side; size 0, or vectors:
    unchanged."""
    if not size or values.dim() < 4 or values.shape[-2:] == (size, size):
        return values
    if values.dim() == 5:
        return torch.stack([resized(frame, size) for frame in values.unbind(2)], dim=2)
    return F.interpolate(values, size=(size, size), mode="bilinear", antialias=True)


def arrange(part: Part, where: str) -> tuple[Part, str]:
    """(the part as [N, features], [N, channels, height, width] or [N, channels, frames, height, width], a note on its
    layout).

    Raises:
        UserError: the dtype or the shape is unsupported, or values are not finite.
    """
    values = part.values
    if values.dtype.kind not in "fiub":
        raise UserError(f"{where}: expected numbers, got dtype {values.dtype}")
    if values.ndim not in (2, 3, 4, 5) or 0 in values.shape:
        expected = "[N, features], [N, H, W], [N, C, H, W] or [N, C, T, H, W]"
        raise UserError(f"{where}: expected {expected}, got shape {tuple(values.shape)}")
    span = part.span
    if values.dtype.kind == "f" and not (span and isinstance(values, Lazy)):  # images were checked as they were read
        measured = span_of_finite(values, where)
        span = span or measured
    elif span is None:
        span = Span.of_blocks(blocks(values), values.dtype) if isinstance(values, Lazy) else Span.of(values)
    layout = ""
    if values.ndim == 3:
        if values.shape[0] == values.shape[1] != values.shape[2]:
            raise UserError(
                f"{where}: shape {values.shape} may be {values.shape[2]} square images with N last: move N to the "
                "front, or save [N, 1, H, W] if it is already there"
            )
        values = laid(values, grey)
    elif values.ndim == 4 and not isinstance(values, (Whole, Crops)) and channels_last(values.shape, where):
        layout = f"channels last, {list(values.shape)}"
        values = laid(values, channels_first)
    elif values.ndim == 5 and (axis := channel_axis(values.shape, where)) != 1:
        layout = f"channels {'last' if axis == 4 else 'after the frames'}, {list(values.shape)}"
        values = laid(values, functools.partial(np.moveaxis, source=axis, destination=1))
    return Part(values, part.labels, span), layout


def grey(values: np.ndarray) -> np.ndarray:
    return values[:, None]


def channels_first(values: np.ndarray) -> np.ndarray:
    return values.transpose(0, 3, 1, 2)


def span_of_finite(values: Any, where: str) -> Span:
    """The span of floating-point rows, which must be finite in float32, where a float64 may overflow."""
    spans, bad, first = [], [], 0
    for block in blocks(values):
        with np.errstate(over="ignore"):
            finite = np.isfinite(block.astype(np.float32)).reshape(len(block), -1).all(axis=1)
        bad += (first + np.flatnonzero(~finite)).tolist()
        spans += [Span.of(block)]
        first += len(block)
    if bad:
        name = values.name(bad[0]) if isinstance(values, Lazy) else f"row {bad[0]}"
        raise UserError(f"{where}: {len(bad)} rows with NaN or infinite values, the first is {name}")
    return Span.joined(spans)


def channels_last(shape: tuple[int, ...], where: str) -> bool:
    """Whether [N, ?, ?, ?] is [N, H, W, C], not [N, C, H, W]: by the number of channels, then by square images."""
    _, first, middle, last = shape
    few = (first <= FEW, last <= FEW)
    if few[0] != few[1]:
        return few[1]
    square = (middle == last, first == middle)
    if square[0] != square[1]:
        return square[1]
    if few[0] or middle <= FEW:
        raise UserError(
            f"{where}: the channel dimension of {list(shape)} is ambiguous; save [N, C, H, W] with at most {FEW} "
            "channels and larger images, or [N, features]"
        )
    return False


def channel_axis(shape: tuple[int, ...], where: str) -> int:
    """The axis of the channels of videos: 1 of [N, C, T, H, W], 2 of [N, T, C, H, W] or 4 of [N, T, H, W, C]."""
    first, second, _, last = (size <= FEW for size in shape[1:])
    if first != last:  # a video may be as short as it has channels: the second axis decides only alone
        return 1 if first else 4
    if second and not first:
        return 2
    raise UserError(
        f"{where}: the channel dimension of {list(shape)} is ambiguous; save [N, C, T, H, W] with at most {FEW} "
        "channels and larger frames"
    )


def whole_range(high: float) -> float:
    """The divisor of whole numbers: the maximum of 8, 10, 12, 14, 16 or 32 bits if the highest bit is used, else
    `high`, the largest number."""
    return next((2**bits - 1 for bits in DEPTHS if 2 ** (bits - 1) <= high < 2**bits), max(1, high))


def divisor(span: Span, vectors: bool, likelihood: str) -> float | None:
    """The divisor that scales pixel values to [0, 1], or None if the values are not pixels."""
    if not span.integer:
        # As for whole numbers, the upper half must be used: values from 0 to 0.01 are not pixels.
        unit = span.low >= -ROUNDING and span.high <= 1 + ROUNDING
        return 1 if unit and (span.high > 0.5 or (likelihood in PIXELS and span.low >= 0)) else None
    if span.low < 0:
        return None
    if span.high <= 1:
        return 1
    # Vectors of whole numbers may be counts; vectors of bytes are flattened pictures.
    pixels = not vectors or 128 <= span.high <= 255 or likelihood in PIXELS
    return whole_range(span.high) if pixels else None


def scale(parts: dict[str, Part], train: np.ndarray, asked: str, stored: bool = False) -> tuple[Scaling, str, str]:
    """(the scaling of all parts, its description, the meaning of the figures).

    `train`: rows of the training part, whose mean and deviation standardise data that are neither pixels nor counts.
    `stored`: they are not in memory, so a sample of them is used.
    """
    spans = {name: part.span for name, part in parts.items() if part.span is not None}
    vectors = parts["train"].values.ndim == 2
    fit_together(spans, vectors, asked)
    span = Span.joined(spans.values())
    if span.low == span.high:
        raise UserError(f"--data: all values are {span.low:g}; the training needs values that differ")
    if asked in COUNTS:
        return counted(parts, span, asked)
    by = divisor(span, vectors, asked)
    likelihood = asked if asked != "auto" else "normal" if by is None else "bernoulli"
    if likelihood in PIXELS:
        if by is None:
            raise UserError(
                f"--likelihood {likelihood} needs values in [0, 1], got values in [{span.low:.4g}, {span.high:.4g}]"
            )
        scaling = Scaling(likelihood, np.zeros(()), np.asarray(float(by)), 0.0, float(by))
        what = f"{span}" + (f", divided by {by}" if by > 1 else "")
        if likelihood in DISCRETE:
            if not span.integer:
                raise UserError(f"--likelihood {likelihood} needs whole numbers, the levels of pixels; got {span}")
            if likelihood == "categorical" and scaling.levels > LEVELS:
                raise UserError(f"--likelihood categorical takes at most {LEVELS} levels, got {scaling.levels}")
            named = f"{likelihood.capitalize()} likelihood on {scaling.levels} levels"
            return scaling, what, f"{named}: log p(x) is a log-probability of the pixels as they are in the file."
        return scaling, what, (
            "Bernoulli likelihood on values in [0, 1]: a value between 0 and 1 is taken as the probability of a 1, so "
            "these figures are lower bounds on the mean log-probability of the binarised data."
        )  # fmt: skip
    values, rows = parts["train"].values, train
    if stored:
        values = sampled(values, train)
        rows = np.arange(len(values))
    mean, deviation = moments(values, rows, vectors)
    what = f"{span}, standardised{' per feature' if vectors else ''}"
    if len(rows) < len(train):
        what += f" by {len(rows):,} of the training data"
    if span.integer and span.low >= 0 and vectors and asked == "auto":
        what += " (if they are pixels: --likelihood bernoulli)"
    return Scaling(likelihood, mean, deviation, *bounds(span, by)), what, (
        f"{likelihood.capitalize()} likelihood on standardised values (mean 0, deviation 1 over the training data), "
        f"whose {'variance' if likelihood == 'normal' else 'scale'} is given by --scale, or learned "
        f"{'per feature' if vectors else 'for all pixels'}: log p(x) is a log-density of these."
    )  # fmt: skip


def counted(parts: dict[str, Part], span: Span, likelihood: str) -> tuple[Scaling, str, str]:
    """`scale` for counts, which are left as they are."""
    each = (block for part in parts.values() for block in blocks(part.values))
    whole = span.integer or all(bool((block == np.floor(block)).all()) for block in each)
    if not whole or span.low < 0:
        raise UserError(f"--likelihood {likelihood} needs counts, whole numbers from 0; got {span}")
    name = likelihood.replace("_", " ").capitalize()
    meaning = f"{name} likelihood on counts: log p(x) is a log-probability of the counts as they are in the file."
    return Scaling(likelihood, np.zeros(()), np.ones(()), span.low, span.high), f"{span}, counts", meaning


def bounds(span: Span, by: float | None) -> tuple[float, float]:
    """The range of values: of pixels with this divisor, of images in [-1, 1], or of the data."""
    if by is not None:
        return 0.0, float(by)
    signed = not span.integer and -1 - ROUNDING <= span.low < 0 < span.high <= 1 + ROUNDING
    return (-1.0, 1.0) if signed else (float(span.low), float(span.high))


def fit_together(spans: dict[str, Span], vectors: bool, likelihood: str) -> None:
    """Raise a UserError if the parts seem to be in different units, without a common scale."""
    train = spans["train"]
    by = divisor(train, vectors, likelihood)
    for name, span in spans.items():
        both = divisor(Span.joined((train, span)), vectors, likelihood)
        pixels = by is not None and (both is None or both > 2 * by + 1)
        shrunk = not vectors and train.low >= 0 and 0 <= span.low <= span.high <= 1 and train.high > 2
        if span.integer != train.integer or pixels or shrunk:
            raise UserError(f"--data: {name} data are {span}, training data {train}: save both with the same scale")


def divided(values: np.ndarray, by: float) -> Tensor:
    """Pixels in [0, 1]."""
    values = np.array(values, dtype=np.float32, order="C")
    if by > 1:
        values /= np.float32(by)
    return torch.from_numpy(values.clip(0, 1, out=values))


def sampled(values: Any, rows: np.ndarray) -> np.ndarray:
    """The values of the first rows, which have been shuffled: of crops, at random places."""
    rows = rows[: max(LEAST_SAMPLED, min(SAMPLED, SAMPLED_NUMBERS // math.prod(values.shape[1:])))]
    if isinstance(values, Crops):
        return values.random(rows, np.random.default_rng(0).random((len(rows), 2)))
    return np.asarray(values[rows])


def moments(values: np.ndarray, rows: np.ndarray, vectors: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation in float64: one per feature of a vector, one for all pixels of an image."""
    axes = 0 if vectors else None
    total = sum(block(values, part).sum(axis=axes) for part in pieces(rows, values))
    count = len(rows) * (1 if vectors else math.prod(values.shape[1:]))
    mean = np.asarray(total / count)
    squares = sum(np.square(block(values, part) - mean).sum(axis=axes) for part in pieces(rows, values))
    deviation = np.sqrt(np.asarray(squares / max(1, count - 1)))
    # A constant feature has deviation 1: the computed one would be rounding noise.
    chosen = values[rows]
    return mean, np.where(chosen.max(axis=axes) > chosen.min(axis=axes), deviation, 1.0)


def standardised(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray, rows: np.ndarray | None = None) -> Tensor:
    """Standardised values. The mean is subtracted in float64, so large numbers keep their last digits."""
    scaled = np.empty(values.shape, dtype=np.float32)
    for part in pieces(np.arange(len(values)), values):
        with np.errstate(over="ignore"):
            scaled[part] = (block(values, part) - mean) / deviation
    if not np.isfinite(scaled).all():
        row = np.flatnonzero(~np.isfinite(scaled).reshape(len(scaled), -1).all(axis=1))[0]
        row = row if rows is None else rows[row]
        raise UserError(f"--data: row {row} is too far from the training data: its standardised values overflow")
    return torch.from_numpy(scaled)


def pieces(rows: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Rows in blocks whose values in float64 have a bounded size."""
    count = max(1, AT_ONCE // math.prod(values.shape[1:]))
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def block(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return values[rows].astype(np.float64)
