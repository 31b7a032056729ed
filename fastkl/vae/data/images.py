"""Folders of images, read at each file's full depth: an error names a picture that Pillow would round or clip."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastkl.vae.data.arrays import BROKEN, Part, Span, first_line
from fastkl.vae.errors import UserError, require

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
# Modes with one channel of more than 8 bits, which NumPy reads unchanged.
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
GREY = ("1", "L", "LA", "La")
ORIENTATION = 0x0112  # the EXIF tag


def read_below(path: Path, image_size: int, option: str) -> tuple[Part, list[str] | None, list[str]]:
    """(images, names of their groups or None, notes for the report) of a folder, read whole."""
    names, others = listed(path, option)
    require("PIL", "Reading images")
    by_depth: dict[str, str] = {}  # depth -> the first image of this depth
    images, spans, laid = [], [], 0
    bad: list[tuple[str, UserError]] = []
    for name in names:
        try:
            pixels, transparent = read_image(path / name, f"{option}: {path / name}")
        except UserError as error:
            bad.append((name, error))
            continue
        by_depth.setdefault(depth(pixels.dtype), name)
        one_depth(by_depth, f"{option} {path}")
        spans.append(Span.of(pixels))
        images.append(resized(pixels, (image_size, image_size)) if image_size else pixels)
        laid += transparent
    refuse(bad)
    one_size({image.shape[1:] for image in images}, f"{option} {path}")
    notes = [f"{len(names):,} images"]
    if len({image.shape[0] for image in images}) > 1:
        images = [np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image for image in images]
        notes.append("the grey ones converted to colour")
    if laid:
        notes.append(f"{laid:,} with transparent pixels, drawn on white")
    if image_size:
        notes.append(f"resized to {image_size} x {image_size} without keeping proportions")
    if others:
        notes.append(f"other files left out: {shortened(others)}")
    labels, groups = grouped(names)
    return Part(np.stack(images), labels, Span.joined(spans)), groups, notes


def listed(path: Path, option: str) -> tuple[list[str], list[str]]:
    """The images and the other files below a folder, relative to it, each in the order of their folders and names.

    Links to folders are followed, except to a folder around the link. A folder that cannot be read is an error.
    """
    found: tuple[list[str], list[str]] = [], []

    def denied(error: OSError) -> None:
        raise UserError(f"{option}: {error.filename} cannot be read ({error.strerror})")

    top = Path(os.path.realpath(path))
    around = {os.fspath(path): {str(top), *map(str, top.parents)}}  # folder -> itself and those that hold it
    for folder, inner, names in os.walk(path, onerror=denied, followlinks=True):
        within = {name: os.path.realpath(os.path.join(folder, name)) for name in inner if not hidden(Path(name))}
        inner[:] = [name for name, real in within.items() if real not in around[folder]]
        around.update({os.path.join(folder, name): {*around[folder], within[name]} for name in inner})
        below = os.path.relpath(folder, path)
        for name in names:
            if not hidden(Path(name)):
                kind = os.path.splitext(name)[1].lower() not in IMAGES
                found[kind].append(name if below == "." else os.path.join(below, name))
    if not found[0]:
        raise UserError(f"{option} {path}: no images in this folder ({', '.join(IMAGES)})")
    images, others = (sorted(names, key=lambda name: name.split(os.sep)) for names in found)
    return images, others


def grouped(names: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels, names of the groups) if each image is in a subfolder and there are several, else (None, None)."""
    places = [name.split(os.sep) for name in names]
    while all(len(place) > 1 for place in places) and len({place[0] for place in places}) == 1:
        places = [place[1:] for place in places]  # one folder around all images is not a group
    groups = sorted({place[0] for place in places if len(place) > 1})
    if len(groups) < 2 or any(len(place) == 1 for place in places):
        return None, None
    number = {group: index for index, group in enumerate(groups)}
    return np.array([number[place[0]] for place in places]), groups


def refuse(bad: list[tuple[str, UserError]]) -> None:
    """Raise one error for all pictures that cannot be read, with their names, so that one start finds all of them."""
    if bad:
        (_, first), *others = bad
        more = shortened([name for name, _ in others], 10)
        raise UserError(f"{first}; {len(others):,} more cannot be read: {more}" if others else str(first))


def one_depth(by_depth: dict[str, str], where: str) -> None:
    """Raise a UserError if images have different depths; `by_depth` has an image of each."""
    if len(by_depth) > 1:
        kinds = ", ".join(f"{file} ({kind})" for kind, file in by_depth.items())
        raise UserError(f"{where}: images of different depths have no common scale: {kinds}")


def one_size(sizes: set[tuple[int, ...]], where: str) -> None:
    """Raise a UserError if images have different sizes."""
    if len(sizes) > 1:
        ways = "give --image-size to resize them, or --crop to cut out squares"
        raise UserError(f"{where}: images of {len(sizes)} different sizes; {ways}")


@contextlib.contextmanager
def opened(source: Any, where: str) -> Iterator[Any]:
    """Pillow's image of a path or an open file; `where` names it in errors."""
    from PIL import Image

    if isinstance(source, Path) and source.exists() and not source.is_file():  # a pipe would be waited for
        raise UserError(f"{where} is not a regular file")
    try:
        with Image.open(source) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # the second frame of an MPO is a preview
                raise UserError(f"{where} holds {image.n_frames} pictures: save each in a separate file")
            if cut(image):
                raise UserError(
                    f"{where} is a colour picture with more than 8 bits per channel; Pillow reads only 8: "
                    "save it in 8 bits, or all pictures in one .npy"
                )
            yield image
    except Image.UnidentifiedImageError:  # its text has the path again, or the address of an open file
        raise UserError(f"{where} is truncated, or not an image that Pillow reads") from None
    except (OSError, SyntaxError, Image.DecompressionBombError, *BROKEN) as error:
        if isinstance(error, OSError) and error.strerror:  # of the system, such as a missing permission
            raise UserError(f"{where} cannot be read ({error.strerror})") from None
        raise UserError(f"{where} is truncated, or not an image that Pillow reads ({first_line(error)})") from None


def read_header(source: Any, where: str) -> tuple[int, int, int, np.dtype]:
    """(channels, height, width, dtype) of an image, without decoding it."""
    with opened(source, where) as image:
        size = image.size
        # Pillow looks for the EXIF data of a PNG behind its pixels, and would decode them for that.
        if (image.format != "PNG" or "exif" in image.info) and image.getexif().get(ORIENTATION, 1) >= 5:
            size = size[::-1]
        deep = image.mode in DEEP
        channels = 1 if deep or image.mode in GREY else 3
        kind = {"I": "i4", "F": "f4"}.get(image.mode, "u2") if deep else "u1"
        return channels, size[1], size[0], np.dtype(kind)


def read_image(source: Any, where: str) -> tuple[np.ndarray, bool]:
    """(pixels [1 or 3, height, width] at the file's depth, rotated by its EXIF tag; whether it was transparent)."""
    from PIL import ImageOps

    with opened(source, where) as image:
        image.load()
        if image.mode == "I" and image.format == "TIFF" and unsigned(image):
            raise UserError(f"{where} has 32-bit values that Pillow reads as negative: save them as .npy")
        image = ImageOps.exif_transpose(image)
        if image.mode in DEEP:
            if "transparency" in image.info:
                raise UserError(f"{where} has transparent pixels and more than 8 bits: save it without transparency")
            return np.asarray(image)[None], False
        image, transparent = flattened(image)
        pixels = np.asarray(image)
    return (pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))), transparent


def flattened(image: Any) -> tuple[Any, bool]:
    """(The picture in 8-bit grey or colour, whether it had transparent pixels, now drawn on white)."""
    from PIL import Image

    if image.mode not in ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise ValueError(f"the kind {image.mode}")
    grey = image.mode in GREY
    palette = image.mode in ("P", "PA")
    transparent = False
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):  # premultiplied alpha: Pillow converts it in one step at a time
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        transparent = image.getchannel("A").getextrema()[0] < 255
        if transparent:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if image.mode == "1" or (image.mode == "L" and grey) else "RGB")
    if image.mode == "RGB" and (grey or palette):
        red, green, blue = image.split()
        if grey or red.tobytes() == green.tobytes() == blue.tobytes():
            image = red
    return image, transparent


def cut(image: Any) -> bool:
    """Whether Pillow would drop bits of this file: it reads colour with 8 bits only."""
    if image.mode in DEEP:
        return False
    for tile in image.tile:
        words = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(word, str) and ";16" in word for word in words):
            return True
        if tile[0] in ("ppm", "ppm_plain") and any(isinstance(word, int) and word > 255 for word in words):
            return True
    return False


def unsigned(image: Any) -> bool:
    """Whether Pillow reads negative values from a TIFF whose header says unsigned."""
    return image.tag_v2.get(339, (1,))[0] == 1 and image.getextrema()[0] < 0


def resized(
    pixels: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """A picture [channels, height, width], or a box (left, top, right, bottom) of it, resized to (height, width), in
    floating point: rounding to the file's levels would lose the edges of a 0/1 mask."""
    from PIL import Image

    shape = size[::-1]
    channels = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize(shape, Image.Resampling.BILINEAR, box))
        for channel in pixels
    ]
    return np.stack(channels).clip(pixels.min(), pixels.max())


def depth(dtype: np.dtype) -> str:
    """The depth of a pixel, in words."""
    kinds = {1: "8 bits", 2: "16 bits", 4: "32 bits"}
    return "floating point" if dtype.kind == "f" else kinds[dtype.itemsize]


def hidden(place: Path) -> bool:
    """Whether the path is a hidden file or folder, such as a system's copy of a picture."""
    return any(part.startswith(".") or part == "__MACOSX" for part in place.parts)


def shortened(names: list[str], shown: int = 3) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
