"""Data sets that Hugging Face's `datasets` has saved by `save_to_disk`: the rows stay on the disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from fastkl.vae.data.arrays import Held, Lazy, Part
from fastkl.vae.data.folder_data import of_files
from fastkl.vae.errors import UserError, require
from fastkl.vae.settings import Settings

IMAGES, VALUES, LABELS = ("image", "img", "images"), ("x", "data", "values", "pixels"), ("label", "labels", "y")
SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}


def is_data_set(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))


def read(path: Path, settings: Settings, option: str) -> Held:
    """The parts of a data set: a column of images or of numbers, and a column of labels if there is one.

    Raises:
        UserError: no column, or more than one, can be the data.
    """
    datasets = require("datasets", "A Hugging Face data set")
    try:
        sets = datasets.load_from_disk(str(path))
    except IndexError:  # `datasets` looks for a first table
        raise UserError(f"{option} {path}: a data set without rows") from None
    by_name = {SPLITS[name]: one for name, one in sets.items() if name in SPLITS} if hasattr(sets, "items") else None
    if by_name == {}:
        raise UserError(f"{option} {path}: expected splits train and test, got {', '.join(sets)}")
    parts: dict[str, Part] = {}
    notes: list[str] = []
    names = None
    for name, rows in (by_name or {"train": sets}).items():
        part, names, own = of_rows(rows, settings, f"{option} {path}", option)
        parts[name], notes = part, notes + [note if by_name is None else f"{name}: {note}" for note in own]
    if by_name and (others := sorted(set(sets) - set(SPLITS))):
        notes.append(f"splits left out: {', '.join(others)}")
    return Held(parts, names, notes)


def of_rows(rows: Any, settings: Settings, where: str, option: str) -> tuple[Part, list[str] | None, list[str]]:
    """(data, names of their labels or None, notes for the report) of one split."""
    features = rows.features
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    arrays = [name for name, feature in features.items() if leaf(feature) is not None]
    column = one_of(images, IMAGES) or one_of(arrays, VALUES)
    if column is None:
        listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise UserError(f"{where}: expected one column of images, or one of arrays called {VALUES[0]}, got {listed}")
    label = next((name for name in LABELS if name in features and name != column), None)
    labels = None if label is None else np.asarray(rows[label][:])
    names = None if label is None else getattr(features[label], "names", None)
    if column not in images:
        values = Column(rows, column, np.dtype(leaf(features[column])), where)
        return Part(values, labels), names, [f"column {column}, left on the disk"]
    part, notes = of_files(Bytes(rows, column, where), settings, where)
    return Part(part.values, labels, part.span), names, [f"column {column}: {note}" for note in notes]


def one_of(found: list[str], usual: tuple[str, ...]) -> str | None:
    """The only column, or the one with a usual name."""
    return found[0] if len(found) == 1 else next((name for name in usual if name in found), None)


def leaf(feature: Any) -> str | None:
    """The dtype of the numbers in a column of arrays or lists, or None for another column."""
    nested = False
    while getattr(feature, "feature", None) is not None:
        feature, nested = feature.feature, True
    dtype = getattr(feature, "dtype", "")
    numeric = isinstance(dtype, str) and dtype.startswith(("float", "int", "uint", "bool"))
    return dtype if numeric and (nested or type(feature).__name__.startswith("Array")) else None


class Column(Lazy):
    """A column of arrays of one shape [N, ...]."""

    def __init__(self, rows: Any, column: str, dtype: np.dtype, where: str):
        self.rows, self.column, self.dtype, self.where = rows.with_format("numpy"), column, dtype, where
        self.shape = (len(rows), *np.shape(self.rows[0][column]))

    def read(self, rows: np.ndarray) -> np.ndarray:
        found = np.asarray(self.rows[rows.tolist()][self.column])
        if found.shape != (len(rows), *self.shape[1:]):
            raise UserError(f"{self.where}: column {self.column} holds arrays of different shapes")
        return found.astype(self.dtype)


class Bytes:
    """The files of a column of images."""

    def __init__(self, rows: Any, column: str, where: str):
        image = require("datasets", "A Hugging Face data set").Image
        self.rows, self.column, self.place = rows.cast_column(column, image(decode=False)), column, where

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, row: int) -> Any:
        item = self.rows[row][self.column] or {}
        if item.get("bytes") is not None:
            return io.BytesIO(item["bytes"])
        if not item.get("path"):
            raise UserError(f"{self.where(row)} is missing")
        return item["path"]

    def where(self, row: int) -> str:
        return f"{self.place}: the image of row {row}"

    @property
    def identity(self) -> bytes:
        return str(len(self)).encode()
