"""Labels of data: 0, 1, ... and their names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastkl.vae.data.arrays import Part
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

MOST_LABELS = 100


def where(part: str, settings: Settings) -> str:
    """The option that gave a part, for error messages."""
    if part == "test" and settings.test_data:
        return f"--test-data {settings.test_data}"
    return f"--data {settings.data}"


def arrange_labels(
    parts: dict[str, Part], names: list[str] | None, settings: Settings, notes: list[str]
) -> tuple[dict[str, Tensor], list[str] | None]:
    """Labels of each part as 0, 1, ..., and their names. Unusable labels, such as one per datum, are left out with a
    note."""
    found: dict[str, np.ndarray] = {}
    for part, of in parts.items():
        if of.labels is None:
            continue
        labels = np.asarray(of.labels)
        if labels.shape[:1] != (len(of.values),):
            got = f"{len(of.values)} {part} data, but labels of shape {list(labels.shape)}"
            raise UserError(f"{where(part, settings)}: {got}")
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if one_hot(labels):
            labels = labels.argmax(1)
        if labels.dtype.kind == "f" and np.isfinite(labels).all() and (labels == np.rint(labels)).all():
            labels = labels.astype(np.int64)
        if labels.ndim != 1 or labels.dtype.kind not in "iubUS":
            notes.append(f"labels of the {part} data left out: shape {list(labels.shape)} of {labels.dtype}")
            continue
        if labels.dtype.kind == "S":
            labels = np.char.decode(labels, errors="replace")
        if names is not None and labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < len(names):
            labels = np.array(names)[labels]
        found[part] = labels
    if len({labels.dtype.kind == "U" for labels in found.values()}) > 1:
        notes.append("labels left out: strings in one part, numbers in another")
        return {}, None
    if not found:
        return {}, None
    kinds = np.unique(np.concatenate(list(found.values())))
    if len(kinds) > MOST_LABELS:
        notes.append(f"labels left out: {len(kinds):,} different labels, more than {MOST_LABELS}")
        return {}, None
    listed = [str(kind) for kind in kinds]
    if names is not None and set(listed) <= set(names):
        listed = [name for name in names if name in listed]  # in the data set's order
    place = np.array([listed.index(str(kind)) for kind in kinds])
    index = {part: torch.from_numpy(place[np.searchsorted(kinds, labels)]) for part, labels in found.items()}
    return index, listed


def one_hot(labels: np.ndarray) -> bool:
    """Whether each row has a single 1 among zeros."""
    if labels.ndim != 2 or labels.dtype.kind not in "iubf":
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all())
