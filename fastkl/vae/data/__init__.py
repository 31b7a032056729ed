"""The data of a run: a built-in set, or a file or folder; checked, scaled and split.

Read `load` below first. The other files are its parts:

    builtin.py      the built-in sets, read from installed packages
    files.py        readers of untrusted files, into the types of arrays.py
    folder_data.py  readers of folders: images.py, shards.py (.npy files), archives.py (.tar files), huggingface.py
    labels.py       labels and their names
    scaling.py      layout, scale and likelihood of the numbers
    stored.py       data that are read when they are used; image_sets.py, pictures decoded then, and crops
    reader.py       the data of each step, read ahead by workers
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.vae import streams
from fastkl.vae.data import files
from fastkl.vae.data.arrays import Held, Lazy, Part
from fastkl.vae.data.builtin import BUILTIN
from fastkl.vae.data.image_sets import Crops, Whole
from fastkl.vae.data.labels import arrange_labels, where
from fastkl.vae.data.scaling import Scaling, arrange, scale
from fastkl.vae.data.stored import Stored, held
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

TEST_FRACTION = 0.2
RANGED = 256  # the range of stored data is that of so many of them


@dataclass(frozen=True)
class Data:
    """Training and test values [N, ...] in float32, labels [N] or None, and notes for the report.

    Training data that are left on the disk or cropped at random are `Stored`, which is indexed as a tensor is.
    """

    name: str
    note: str
    scaling: Scaling
    train: Tensor | Stored
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    label_names: list[str] | None
    validation: Tensor | None = None  # the data of the curves, if given; the test data are then used at the end only
    source: str = ""  # the path, or the name of a built-in set
    values: str = ""  # the range of the original numbers, and their scaling
    notes: tuple[str, ...] = ()  # other choices made while reading

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one datum: (features,), (channels, height, width) or (channels, frames, height, width)."""
        return tuple(self.train.shape[1:])

    @property
    def likelihood(self) -> str:
        return self.scaling.likelihood

    @property
    def watched(self) -> Tensor:
        """The held-out data of the curves."""
        return self.test if self.validation is None else self.validation

    @property
    def watched_name(self) -> str:
        return "test" if self.validation is None else "validation"

    @property
    def counts(self) -> str:
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash by which a resumed run checks that its data are unchanged: of all values, or for stored training data
        of the names of the files and of a few values."""
        digest = hashlib.sha256(str((self.likelihood, self.shape)).encode())
        for part in (self.train, self.validation, self.test):
            if isinstance(part, Stored):
                digest.update(part.identity)
            elif part is not None:
                digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def range(self) -> tuple[float, float]:
        """The least and the largest training value; of stored data, of some of them."""
        some = self.train[:RANGED] if isinstance(self.train, Stored) else self.train
        return some.min().item(), some.max().item()


def load(settings: Settings, given: Any = None) -> Data:
    """The data that the settings name, or `given`: an array or tensor [N, ...], a pair with labels [N], or a dictionary
    with names such as x, y, x_test and y_test.

    Raises:
        UserError: data cannot be read, are too few, or do not fit the options or each other.
    """
    if given is not None:
        found, name, source, note = files.choose(files.arrays_of(given), "data"), "array", "an array", ""
        settings = dataclasses.replace(settings, data="(an array)")  # the name in error messages
    elif settings.data in BUILTIN:
        (found, note), name, source = BUILTIN[settings.data](settings), settings.data, settings.data
    else:
        path = Path(settings.data)
        found, name, source, note = files.read(path, settings), path.resolve().name, settings.data, ""
        if "train" not in found.parts:
            raise UserError(f"--data {path}: expected training data, got only {' and '.join(found.parts)} data")
    parts, notes = with_test_data(found, settings)
    for part in parts:
        parts[part], layout = arrange(parts[part], where(part, settings))
        notes += [f"{part}: read as {layout}"] if layout else []
        parts[part] = cropped(parts[part], where(part, settings), settings)
    shape, count = parts["train"].values.shape[1:], len(parts["train"].values)
    if count < 10:
        raise UserError(f"--data {settings.data}: at least 10 rows are needed to train and test, got {count}")
    if settings.flip and len(shape) == 1:
        raise UserError(f"{where('train', settings)}: --flip needs images, got rows of {shape[0]} numbers")
    for part, of in parts.items():
        if of.values.shape[1:] != shape:
            got = f"expected {part} data of shape {list(shape)} as the training data, got {list(of.values.shape[1:])}"
            raise UserError(f"{where(part, settings)}: {got}")
    labels_of, names = arrange_labels(parts, found.names, settings, notes)
    rows = split(parts, settings)
    stored = settings.stream or settings.flip or any(isinstance(part.values, Lazy) for part in parts.values())
    if stored:
        rows = {name: bounded(name, part, index, shape, notes) for name, (part, index) in rows.items()}
    scaling, what, meaning = scale(parts, rows["train"][1], settings.likelihood, stored)
    size = 0 if isinstance(parts["train"].values, (Whole, Crops)) else settings.image_size
    views = {name: Stored(parts[part].values, index, scaling, size) for name, (part, index) in rows.items()}
    if views["train"].shape[1:] != shape:
        what += f", resized to {size} x {size}"
    train = dataclasses.replace(views["train"], flip=settings.flip, random=True, seed=settings.seed)
    kept = {
        name: None if labels_of.get(part) is None else labels_of[part][torch.from_numpy(index)]
        for name, (part, index) in rows.items()
    }
    notes += [line for line in (crops(settings),) if line]
    note = " ".join(filter(None, (note, *(f"{line[0].upper()}{line[1:]}." for line in notes), meaning)))
    return Data(
        name, note, scaling, train if stored else train[:], views["test"][:], kept["train"], kept["test"], names,
        views["validation"][:] if "validation" in views else None, source, what, tuple(notes),
    )  # fmt: skip


def cropped(part: Part, where: str, settings: Settings) -> Part:
    """With --crop, the squares of images that are not `Crops` yet."""
    if not settings.crop or isinstance(part.values, Crops):
        return part
    if part.values.ndim != 4:
        raise UserError(f"{where}: --crop needs images, got rows of {part.values.shape[1]} numbers")
    return Part(Crops(part.values, settings.crop, settings.image_size, where), part.labels, part.span)


def bounded(name: str, part: str, rows: np.ndarray, shape: tuple[int, ...], notes: list[str]) -> tuple[str, np.ndarray]:
    """The rows of a part, as many held-out ones as fit into the memory."""
    kept = rows if name == "train" else held(rows, shape)
    if len(kept) < len(rows):
        notes.append(f"{name}: {len(kept):,} of {len(rows):,} data, at random, which stay in memory")
    return part, kept


def crops(settings: Settings) -> str:
    """A note on random crops and flips."""
    ways = [f"cropped at random to {settings.crop} x {settings.crop}"] if settings.crop else []
    ways += ["flipped at random"] if settings.flip else []
    return f"training images are {' and '.join(ways)}" if ways else ""


def with_test_data(held: Held, settings: Settings) -> tuple[dict[str, Part], list[str]]:
    """The parts of --data and --test-data together, and their notes."""
    parts, notes = dict(held.parts), list(held.notes)
    if not settings.test_data:
        return parts, notes
    if "test" in parts:
        raise UserError(f"--test-data {settings.test_data}: --data {settings.data} already holds test data")
    if Path(settings.test_data).resolve() == Path(settings.data).resolve():
        raise UserError(f"--test-data {settings.test_data} is the same file as --data, the training data")
    given = files.read(Path(settings.test_data), settings, "--test-data")
    test = given.parts.get("test", given.parts.get("train"))
    if test is None:
        raise UserError(f"--test-data {settings.test_data}: it holds only validation data")
    if given.names is not None and test.labels is not None:  # by name: each folder numbers its labels separately
        test = Part(test.values, np.array(given.names)[test.labels], test.span)
    return {**parts, "test": test}, notes + [f"test: {note}" for note in given.notes]


def split(parts: dict[str, Part], settings: Settings) -> dict[str, tuple[str, np.ndarray]]:
    """The part and the rows of the training, validation and test data.

    Rows are shuffled, because files are often sorted by label and the curves use the first thousand rows.
    """

    def order(part: str) -> np.ndarray:
        generator = streams.generator(settings.split_seed, "split" if part == "train" else part)
        return torch.randperm(len(parts[part].values), generator=generator, dtype=torch.int64, device="cpu").numpy()

    rest, rows = order("train"), {}
    if "test" in parts:
        rows["test"] = ("test", order("test"))
    else:
        held_out = int(len(rest) * TEST_FRACTION)
        rows["test"], rest = ("train", rest[:held_out]), rest[held_out:]
    if "validation" in parts:
        if settings.validation:
            raise UserError(f"--validation: --data {settings.data} already holds validation data")
        rows["validation"] = ("validation", order("validation"))
    elif settings.validation:
        held_out = int(len(rest) * settings.validation)
        if not 0 < held_out < len(rest):
            raise UserError(
                f"--validation {settings.validation:g} of {len(rest)} training data leaves one of the two parts empty"
            )
        rows["validation"], rest = ("train", rest[:held_out]), rest[held_out:]
    part, test = rows["test"]
    return {**rows, "test": (part, test[: settings.test_count or None]), "train": ("train", rest)}
