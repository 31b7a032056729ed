"""Images that are decoded when they are used: whole, or as crops."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from fastkl.vae.data.arrays import Lazy, Span
from fastkl.vae.data.images import depth, one_depth, one_size, read_header, read_image, refuse, resized
from fastkl.vae.errors import UserError, require

CENTRE = 0.5 - 1e-9  # a place, rounded down if it is between two pixels


class Files(Protocol):
    """A source of encoded images: a folder, archives, or a table."""

    @property
    def identity(self) -> bytes:
        """The names of the images."""

    def __len__(self) -> int: ...

    def open(self, row: int) -> Any:
        """The path of an image, or an open file."""

    def where(self, row: int) -> str:
        """The name of an image in error messages."""


class Pictures:
    """A sequence of pictures [channels, height, width] of one depth, whose sizes [N, 2] may differ."""

    sizes: np.ndarray
    channels: int
    dtype: np.dtype
    identity = b""  # bytes that tell these pictures from others, such as their names

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> np.ndarray:
        raise NotImplementedError

    def name(self, row: int) -> str:
        return f"picture {row}"


class Decoded(Pictures):
    """Pictures that are decoded when they are indexed; grey ones among colour ones become colour.

    The constructor opens every header, so foreign and empty files are found before the training. A file that is cut
    after its header is found when it is decoded.

    Raises:
        UserError: a file is not an image, or its depth differs from that of others.
    """

    def __init__(self, files: Files, where: str):
        require("PIL", "Reading images")
        self.files, self.name = files, files.where  # type: ignore[method-assign]
        self.sizes = np.empty((len(files), 2), dtype=np.int32)
        self.channels = 1
        by_depth: dict[str, str] = {}  # depth -> the first image of this depth
        bad: list[tuple[str, UserError]] = []
        for row in range(len(files)):
            try:
                channels, *self.sizes[row], self.dtype = read_header(files.open(row), files.where(row))
            except UserError as error:
                bad.append((files.where(row).partition(": ")[2], error))
                continue
            by_depth.setdefault(depth(self.dtype), files.where(row))
            one_depth(by_depth, where)
            self.channels = max(self.channels, channels)
        refuse(bad)

    def __getitem__(self, row: int) -> np.ndarray:
        pixels, _ = read_image(self.files.open(row), self.name(row))
        if pixels.shape[1:] != tuple(self.sizes[row]) or depth(pixels.dtype) != depth(self.dtype):
            raise UserError(f"{self.name(row)} has changed since the start of this run")
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise UserError(f"{self.name(row)} has NaN or infinite values")
        return np.repeat(pixels, self.channels, axis=0) if len(pixels) < self.channels else pixels

    @property
    def identity(self) -> bytes:  # type: ignore[override]
        return self.files.identity

    @property
    def span(self) -> Span:
        """The span of all pictures, see `Span.of_blocks`."""
        return Span.of_blocks((self[row] for row in range(len(self))), self.dtype)


class Whole(Lazy):
    """Whole pictures [N, channels, height, width]: of one size, or with `size` pixels a side."""

    def __init__(self, pictures: Pictures, size: int, where: str):
        if not size:
            one_size({tuple(size) for size in np.unique(pictures.sizes, axis=0).tolist()}, where)
        self.pictures, self.size = pictures, size
        self.dtype = np.dtype(np.float32) if size else pictures.dtype
        self.shape = (len(pictures), pictures.channels, *((size, size) if size else map(int, pictures.sizes[0])))

    def read(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for place, row in enumerate(rows.tolist()):
            pixels = self.pictures[row]
            found[place] = resized(pixels, (self.size, self.size)) if self.size else pixels
        return found

    @property
    def identity(self) -> bytes:
        return self.pictures.identity


class Crops(Lazy):
    """Squares [N, channels, crop, crop] cut out of pictures, each first resized so that its shorter side has `size`
    pixels (0: as it is). The rows have the centre of each picture, and `random` has squares at given places.

    Args:
        source: pictures, or an array [N, channels, height, width], in memory or lazy.
        where: the option that gave the pictures, for error messages.

    Raises:
        UserError: a picture is smaller than the square.
    """

    def __init__(self, source: Any, crop: int, size: int, where: str):
        self.source, self.crop, self.size = source, crop, size
        if size:
            require("PIL", "--crop with --image-size")
        sizes = source.sizes if isinstance(source, Pictures) else np.array([source.shape[2:]])
        short = sizes.min(axis=1)
        if not size and short.min() < crop:
            row = int(short.argmin())
            name = f" ({source.name(row)})" if isinstance(source, Pictures) else ""
            problem = f"--crop {crop} is larger than an image of {' x '.join(map(str, sizes[row]))}{name}"
            raise UserError(f"{where}: {problem}; --image-size {crop} resizes the shorter sides")
        exact = not size or bool((short == size).all())
        self.dtype = source.dtype if exact else np.dtype(np.float32)
        channels = source.channels if isinstance(source, Pictures) else source.shape[1]
        self.shape = (len(source), channels, crop, crop)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.random(rows, np.full((len(rows), 2), CENTRE))

    def random(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The squares of some rows at places [n, 2] from 0 (top, left) to 1 (bottom, right)."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for row, place, square in zip(rows.tolist(), places, found):
            square[:] = cut_out(self.source[row], self.crop, self.size, place)
        return found

    @property
    def identity(self) -> bytes:
        return getattr(self.source, "identity", b"")


def cut_out(pixels: np.ndarray, crop: int, size: int, place: np.ndarray) -> np.ndarray:
    """A square of a picture that is first resized to `size` pixels on its shorter side (0: as it is)."""
    sides = np.array(pixels.shape[1:])
    scale = (size or sides.min()) / sides.min()
    full = np.rint(sides * scale)  # height and width of the resized picture
    top, left = np.minimum(place * (full - crop + 1), full - crop).astype(int).tolist()
    if scale == 1:
        return pixels[:, top : top + crop, left : left + crop]
    down, right = sides / full  # pixels of the file per pixel of the resized picture
    box = (left * right, top * down, (left + crop) * right, (top + crop) * down)
    return resized(pixels, (crop, crop), box)
