"""Readers of untrusted data files: they never run code of the file, and report problems as one-line errors."""

from __future__ import annotations

import contextlib
import errno
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.vae.data import huggingface
from fastkl.vae.data.arrays import BROKEN, Held, Part, first_line
from fastkl.vae.data.folder_data import read_folder, read_part, refuse_reading_whole
from fastkl.vae.data.images import shortened
from fastkl.vae.data.shards import Shards
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

# Usual names of the arrays of a file, in lower case and without separators: images_train is imagestrain.
SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}
VALUES, LABELS = ("x", "images", "data"), ("y", "labels", "label", "targets", "target")


def joined(split: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """xtrain, trainx, ..., for each usual name of this part."""
    return tuple(name for word in SPLITS[split] for kind in kinds for name in (kind + word, word + kind))


VALUE_NAMES = {split: (*joined(split, VALUES), *SPLITS[split]) for split in SPLITS}
LABEL_NAMES = {split: joined(split, LABELS) for split in SPLITS}
VALUE_NAMES["train"] = (*VALUES, *VALUE_NAMES["train"], "values", "arr0")
LABEL_NAMES["train"] = (*LABELS, *LABEL_NAMES["train"], "arr1")


def read(path: Path, settings: Settings, option: str = "--data") -> Held:
    """The data of a file or folder. They stay on the disk with --stream, and always in folders of .npy files, tar
    archives and Hugging Face data sets; images do with --crop, too."""
    if not path.exists():
        other = ", and no built-in data set of that name" if option == "--data" else ""
        raise UserError(f"{option} {path}: no such file or folder{other}")
    readers = {".npy": read_npy, ".npz": read_npz, ".pt": read_pt, ".pth": read_pt}
    suffix = path.suffix.lower()
    with report_errors(path, option):
        if path.is_dir():
            reader = huggingface.read if huggingface.is_data_set(path) else read_folder
            return reader(path, settings, option)
        if suffix not in (*readers, ".tar"):
            raise UserError(f"{option} {path}: expected a .npy, .npz, .pt or .tar file, or a folder")
        if path.stat().st_size == 0:
            raise UserError(f"{option} {path}: the file is empty")
        if suffix == ".tar":
            part, names, notes = read_part(path, settings, option)
            return Held({"train": part}, names, notes)
        if suffix == ".npy" and settings.stream:
            return Held({"train": Part(Shards([path], option))})
        refuse_reading_whole(settings, f"{option} {path}")
        return readers[suffix](path, option)


@contextlib.contextmanager
def report_errors(path: Path, option: str) -> Iterator[None]:
    """A context that turns the errors of a damaged file into UserErrors of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror or first_line(error)})") from None
    except BROKEN as error:
        if isinstance(error, pickle.UnpicklingError) or any(
            word in str(error) for word in ("pickle", "Python objects")
        ):
            # The library's message is not shown: it explains how to load the file anyway, which would run its code.
            raise UserError(
                f"{option} {path}: not a {path.suffix} file, or one with Python objects, which are not loaded because "
                "they can run code: save plain arrays or tensors"
            ) from None
        kind = "folder of data" if path.is_dir() else f"{path.suffix} file of plain arrays"
        raise UserError(f"{option} {path}: truncated, or not a {kind} ({first_line(error)})") from None


def read_npy(path: Path, option: str) -> Held:
    return Held({"train": Part(np.array(mapped(path, option)))})


def mapped(path: Path, option: str) -> np.ndarray:
    """The array of a .npy file, whose rows are read when they are used."""
    with report_errors(path, option):
        # Memory mapping checks the file's length against its header before any memory is allocated.
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_npz(path: Path, option: str) -> Held:
    with np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array; rename it to .npy")
        return choose({name: archive[name] for name in archive.files}, f"{option} {path}")


def read_pt(path: Path, option: str) -> Held:
    return choose(named(load_tensors(path), f"{option} {path}"), f"{option} {path}")


def load_tensors(path: Path) -> Any:
    """Load a file of torch.save with tensors and plain containers only; warnings are muted in favour of our errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("its end is missing") from None  # torch has searched before the file's beginning


def arrays_of(given: Any) -> dict[str, np.ndarray]:
    """Arrays by name, from an array, a pair of data and labels, or a dictionary."""
    if isinstance(given, dict):
        return {str(name): as_array(value) for name, value in given.items()}
    values, *labels = given if isinstance(given, tuple) else (given,)
    if len(labels) > 1:
        raise UserError(f"data must be an array, a pair (data, labels) or a dictionary, got {1 + len(labels)} parts")
    return {name: as_array(value) for name, value in zip("xy", (values, *labels))}


def named(held: Any, where: str) -> dict[str, np.ndarray]:
    """Arrays by name, from a tensor, a dictionary, a tuple (images, labels), or a list of one tensor per datum."""
    if isinstance(held, Tensor):
        return {"x": as_array(held)}
    if isinstance(held, dict):
        arrays: dict[str, np.ndarray] = {}
        for name, value in held.items():
            if isinstance(value, (dict, tuple)) and str(name).lower() in sum(SPLITS.values(), ()):
                arrays.update({f"{name}_{inner}": array for inner, array in named(value, where).items()})
            elif isinstance(value, Tensor) or plain(value):
                arrays[str(name)] = as_array(value)
        return arrays
    if not isinstance(held, (tuple, list)):
        raise UserError(f"{where}: expected tensors, got {type(held).__name__}")
    if len(held) == 1 and isinstance(held[0], Tensor):
        return {"x": as_array(held[0])}
    if len(held) == 2 and labelled(*held):
        return {"x": as_array(held[0]), "y": as_array(held[1])}
    if len(held) in (2, 3) and all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in held):
        splits = ("train", "test") if len(held) == 2 else ("train", "validation", "test")
        if all(labelled(*pair) for pair in held):
            return {
                f"{kind}_{split}": as_array(array)
                for split, pair in zip(splits, held)
                for kind, array in zip("xy", pair)
            }
    if len(held) >= 10:  # a run needs at least 10 data; a shorter list is something else
        if all(isinstance(datum, Tensor) for datum in held) and len({datum.shape for datum in held}) == 1:
            return {"x": as_array(torch.stack(list(held)))}
        if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in held):
            pairs = named([pair[0] for pair in held], where)
            return {**pairs, "y": as_array([int(label) for _, label in held])}
    shapes = [str(list(one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in held]
    raise UserError(
        f"{where}: expected (images, labels), one tensor per datum with all of one shape, or a dictionary with names "
        f"such as x, y, x_test and y_test; got a {type(held).__name__} of {shortened(shapes)}"
    )


def labelled(values: Any, labels: Any) -> bool:
    """Whether `labels` has one entry for each datum of `values`."""
    if not isinstance(values, Tensor) or values.dim() < 2 or not (isinstance(labels, Tensor) or plain(labels)):
        return False
    shape = tuple(np.shape(as_array(labels)))
    return shape in ((len(values),), (len(values), 1))


def plain(value: Any) -> bool:
    """Whether this is a list of numbers or strings, a usual form of labels."""
    return (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(one, (int, float, str)) for one in value)
    )


def as_array(value: Any) -> np.ndarray:
    """The values of a tensor, or of anything that NumPy takes, without a copy if possible."""
    if not isinstance(value, Tensor):
        return np.asarray(value)  # not copied: it may be a mapping of a file
    value = (value if value.layout == torch.strided else value.to_dense()).detach().resolve_conj().resolve_neg()
    # NumPy has no bfloat16 and no 8-bit floats; float32 represents all of their values.
    return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()


def choose(arrays: dict[str, np.ndarray], where: str) -> Held:
    """The parts of a data set among named arrays."""
    by_name = {name.lower().replace("_", "").replace("-", ""): name for name in reversed(arrays)}
    parts: dict[str, Part] = {}
    used: set[str] = set()
    for split in SPLITS:
        values, labels = (
            next((by_name[name] for name in names[split] if name in by_name), None)
            for names in (VALUE_NAMES, LABEL_NAMES)
        )
        if values is None and split == "train" and len(arrays) == 1 and not parts:
            values = next(name for name in arrays)
        if values is None:
            continue
        if labels is not None and np.shape(arrays[labels])[:1] != np.shape(arrays[values])[:1] and labels == "arr_1":
            labels = None  # the second unnamed array need not hold labels
        parts[split] = Part(arrays[values], None if labels is None else arrays[labels])
        used |= {values} if labels is None else {values, labels}
    if not parts:
        listed = shortened(sorted(arrays), 10) or "none"
        raise UserError(f"{where}: expected an array called {', '.join(VALUES)}, got {listed}")
    left = sorted(set(arrays) - used)
    return Held(parts, None, [f"left out of the file: {shortened(left)}"] if left else [])
