"""Images in folders and in tar archives, found once and opened one by one."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np

from fastkl.vae.data.arrays import first_line
from fastkl.vae.data.images import IMAGES, hidden, shortened
from fastkl.vae.errors import UserError

BLOCK = 512  # bytes of a header in a tar file, and of the zeros at its end


class Folder:
    """Image files below a folder. Names are kept in one array, because a list of a million strings would be copied into
    each process that reads them."""

    def __init__(self, path: Path, names: list[str], option: str):
        self.path, self.option = path, option
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def open(self, row: int) -> Path:
        return self.path / os.fsdecode(self.names[row])

    def where(self, row: int) -> str:
        return f"{self.option}: {self.open(row)}"

    @property
    def identity(self) -> bytes:
        return b"\0".join(self.names.tolist())


class Tars:
    """Images in tar files in the layout of WebDataset: members `KEY.jpg` and, for labels, `KEY.cls`.

    Every header is read once; an image is then read from its place.

    Attributes:
        labels: the numbers in the `.cls` members [N], or None unless each image has one.
        notes: notes on the members left out.

    Raises:
        UserError: an archive is truncated, compressed or foreign, or holds no images; the message names it.
    """

    def __init__(self, paths: list[Path], option: str):
        self.paths, self.option = paths, option
        names, spots, classes, others = [], [], [], set()
        for number, path in enumerate(paths):
            held: dict[str, bytes] = {}
            keys = []
            for member, content in members(path, option):
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                key = f"{member.name.rpartition('/')[0]}/{key}"
                if kind == "cls":
                    held[key] = content
                elif f".{kind.rpartition('.')[2].lower()}" in IMAGES:
                    names.append(member.name.encode(errors="surrogateescape"))
                    spots.append((number, member.offset_data, member.size))
                    keys.append(key)
                else:
                    others.add(f".{kind}")
            classes += [held.get(key) for key in keys]
        if not names:
            raise UserError(f"{option} {paths[0]}: no images in this archive ({', '.join(IMAGES)})")
        self.names, self.spots = np.array(names), np.array(spots, dtype=np.int64)
        self.notes = [f"other members left out: {shortened(sorted(others))}"] if others else []
        self.labels = self.numbers(classes)

    def numbers(self, classes: list[bytes | None]) -> np.ndarray | None:
        """The labels in the contents of `.cls` members, one for each image; None without a member or without labels."""
        if not any(each is not None for each in classes):
            return None
        try:
            return np.array([int(each) for each in classes])  # type: ignore[arg-type]
        except (TypeError, ValueError):
            self.notes.append("labels left out: not every image has a .cls member with a whole number")
            return None

    def __len__(self) -> int:
        return len(self.names)

    def open(self, row: int) -> io.BytesIO:
        number, offset, size = self.spots[row].tolist()
        try:
            with open(self.paths[number], "rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))
        except OSError as error:
            path = self.paths[number]
            raise UserError(f"{self.option} {path}: cannot be read ({error.strerror or first_line(error)})") from None

    def where(self, row: int) -> str:
        return f"{self.option}: {os.fsdecode(self.names[row])} in {self.paths[self.spots[row, 0]]}"

    @property
    def identity(self) -> bytes:
        return b"\0".join(self.names.tolist())


def members(path: Path, option: str):
    """(member, content of a .cls member) of each file in a tar archive."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep each header
                if member.isfile() and not hidden(Path(member.name)):
                    yield member, content_of(archive, member)
            archive.fileobj.seek(archive.offset)  # type: ignore[union-attr]
            end = archive.fileobj.read(BLOCK)  # type: ignore[union-attr]
    except tarfile.ReadError as error:
        raise UserError(f"{option} {path}: truncated, or not a plain tar file ({first_line(error)})") from None
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror or first_line(error)})") from None
    # tarfile ends without an error at a header that it cannot read, and at the end of a file.
    if end != bytes(BLOCK):
        raise UserError(
            f"{option} {path}: {'damaged' if len(end) == BLOCK else 'truncated'} after its last whole member"
        )


def content_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) if member.name.endswith(".cls") else None
    return b"" if file is None else file.read()
