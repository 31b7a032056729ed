"""Folders of data: images, .npy files, tar archives or a Hugging Face data set, with their parts and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastkl.vae.data.archives import Folder, Tars
from fastkl.vae.data.arrays import Held, Part
from fastkl.vae.data.image_sets import Crops, Decoded, Files, Whole
from fastkl.vae.data.images import grouped, hidden, listed, read_below, shortened
from fastkl.vae.data.shards import Shards
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

Read = tuple[Part, list[str] | None, list[str]]  # data, names of their labels or None, and notes for the report
TRAIN, TEST, VALIDATION = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")


def read_folder(path: Path, settings: Settings, option: str) -> Held:
    """The data of a folder, in the order of their names.

    Subfolders `train` and `test` (or `val`) are the parts of the data, and each is read in this way.
    """
    inside = {item.name.lower(): item for item in path.iterdir() if item.is_dir()}
    training, testing, validating = (
        next((inside[name] for name in names if name in inside), None) for names in (TRAIN, TEST, VALIDATION)
    )
    if training is None or (testing is None and validating is None):
        part, groups, notes = read_part(path, settings, option)
        return Held({"train": part}, groups, notes)
    chosen = {"train": training, "validation": validating, "test": testing}
    read = {name: read_part(folder, settings, option) for name, folder in chosen.items() if folder is not None}
    notes = [f"{name}: {note}" for name, (_, _, notes) in read.items() for note in notes]
    used = {folder for folder in chosen.values() if folder is not None}
    if others := sorted(item.name for item in path.iterdir() if item not in used and not item.name.startswith(".")):
        notes.append(f"left out, beside train and test: {shortened(others)}")
    # Labels by name: each part has numbered its groups separately.
    parts = {
        name: Part(part.values, part.labels if groups is None else np.array(groups)[part.labels], part.span)
        for name, (part, groups, _) in read.items()
    }
    return Held(parts, None, notes)


def read_part(path: Path, settings: Settings, option: str) -> Read:
    """(data, names of their labels or None, notes for the report) of a folder without parts, or of one tar archive."""
    for suffix in (".npy", ".tar"):
        items = [item for item in path.iterdir() if not hidden(Path(item.name))] if path.is_dir() else [path]
        named = sorted(item for item in items if item.suffix.lower() == suffix)
        if not named:
            continue
        if suffix == ".npy":
            found: Read = Part(Shards(named, option)), None, [f"{len(named):,} files of rows, left on the disk"]
        else:
            found = of_tars(Tars(named, option), settings, f"{option} {path}")
        if others := sorted(item.name for item in items if item.suffix.lower() != suffix):
            found[2].append(f"left out, beside the {suffix} files: {shortened(others)}")
        return found
    if not (settings.stream or settings.crop):
        return read_below(path, settings.image_size, option)
    names, others = listed(path, option)
    part, notes = of_files(Folder(path, names, option), settings, f"{option} {path}")
    if others:
        notes.append(f"other files left out: {shortened(others)}")
    labels, groups = grouped(names)
    return Part(part.values, labels, part.span), groups, notes


def of_tars(tars: Tars, settings: Settings, where: str) -> Read:
    """The images of archives, with their labels; as in read_part."""
    part, notes = of_files(tars, settings, where)
    return Part(part.values, tars.labels, part.span), None, notes + tars.notes


def of_files(files: Files, settings: Settings, where: str) -> tuple[Part, list[str]]:
    """(images that are decoded when they are used, notes)."""
    pictures, size = Decoded(files, where), settings.image_size
    notes = [f"{len(pictures):,} images, decoded when they are used"]
    if settings.crop:
        values: Crops | Whole = Crops(pictures, settings.crop, size, where)
    else:
        values = Whole(pictures, size, where)
        notes += [f"resized to {size} x {size} without keeping proportions"] if size else []
    return Part(values, None, pictures.span), notes


def refuse_reading_whole(settings: Settings, where: str) -> None:
    """Raise a UserError if --stream asks for data of a kind that is only read whole."""
    if settings.stream:
        raise UserError(f"{where}: --stream needs a .npy file, a .tar file or a folder; these data are read whole")
