"""Folders of images, read at each file's full depth: an error names a picture that Pillow would round or clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastkl.vae.arrays import BROKEN, Held, Part, Span, first_line
from fastkl.vae.errors import UserError, require

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
TRAIN, TEST, VALIDATION = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
# Modes with one channel of more than 8 bits, which NumPy reads unchanged.
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def read_folder(path: Path, image_size: int, option: str) -> Held:
    """Every image below the folder, in sorted order. Subfolders name the labels if each image is in one.

    Subfolders `train` and `test` (or `val`) are the parts of the data, and each is read in this way.
    """
    inside = {item.name.lower(): item for item in path.iterdir() if item.is_dir()}
    training, testing, validating = (
        next((inside[name] for name in names if name in inside), None) for names in (TRAIN, TEST, VALIDATION)
    )
    if training is None or (testing is None and validating is None):
        images, groups, notes = read_below(path, image_size, option)
        return Held({"train": images}, groups, notes)
    chosen = {"train": training, "validation": validating, "test": testing}
    read = {name: read_below(folder, image_size, option) for name, folder in chosen.items() if folder is not None}
    notes = [f"{name}: {note}" for name, (_, _, notes) in read.items() for note in notes]
    used = {folder for folder in chosen.values() if folder is not None}
    if others := sorted(item.name for item in path.iterdir() if item not in used and not item.name.startswith(".")):
        notes.append(f"left out, beside train and test: {shortened(others)}")
    # Labels by name: each part has numbered its groups separately.
    parts = {
        name: Part(part.values, None if part.labels is None else np.array(groups)[part.labels], part.span)
        for name, (part, groups, _) in read.items()
    }
    return Held(parts, None, notes)


def read_below(path: Path, image_size: int, option: str) -> tuple[Part, list[str] | None, list[str]]:
    """(images, names of their groups or None, notes for the report)."""
    files = [item for item in path.rglob("*") if item.is_file() and not hidden(item.relative_to(path))]
    names = sorted(item for item in files if item.suffix.lower() in IMAGES)
    if not names:
        raise UserError(f"{option} {path}: no images in this folder ({', '.join(IMAGES)})")
    require("PIL", "Reading images")
    by_depth: dict[str, str] = {}  # depth -> the first image of this depth
    images, spans, laid = [], [], 0
    for name in names:
        pixels, transparent = read_image(name, option)
        by_depth.setdefault(depth(pixels), str(name.relative_to(path)))
        if len(by_depth) > 1:
            listed = ", ".join(f"{file} ({kind})" for kind, file in by_depth.items())
            raise UserError(f"{option} {path}: images of different depths have no common scale: {listed}")
        spans.append(Span.of(pixels))
        images.append(resized(pixels, image_size) if image_size else pixels)
        laid += transparent
    if len(shapes := {image.shape[1:] for image in images}) > 1:
        raise UserError(f"{option} {path}: images of {len(shapes)} different sizes; give --image-size to resize them")
    notes = [f"{len(names):,} images"]
    if len({image.shape[0] for image in images}) > 1:
        images = [np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image for image in images]
        notes.append("the grey ones converted to colour")
    if laid:
        notes.append(f"{laid:,} with transparent pixels, drawn on white")
    if image_size:
        notes.append(f"resized to {image_size} x {image_size} without keeping proportions")
    if others := sorted(str(item.relative_to(path)) for item in files if item.suffix.lower() not in IMAGES):
        notes.append(f"other files left out: {shortened(others)}")
    places = [name.relative_to(path).parts for name in names]
    while all(len(place) > 1 for place in places) and len({place[0] for place in places}) == 1:
        places = [place[1:] for place in places]  # one folder around all images is not a group
    groups = sorted({place[0] for place in places if len(place) > 1})
    pictures = Part(np.stack(images), None, Span.joined(spans))
    if len(groups) < 2 or any(len(place) == 1 for place in places):
        return pictures, None, notes
    labels = np.array([groups.index(place[0]) for place in places])
    return Part(pictures.values, labels, pictures.span), groups, notes


def read_image(path: Path, option: str) -> tuple[np.ndarray, bool]:
    """(pixels [1 or 3, height, width] at the file's depth, rotated by its EXIF tag; whether it was transparent)."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # the second frame of an MPO is a preview
                raise UserError(f"{option}: {path} holds {image.n_frames} pictures: save each in a separate file")
            if cut(image):
                raise UserError(
                    f"{option}: {path} is a colour picture with more than 8 bits per channel; Pillow reads only 8: "
                    "save it in 8 bits, or all pictures in one .npy"
                )
            image.load()
            if image.mode == "I" and image.format == "TIFF" and unsigned(image):
                raise UserError(f"{option}: {path} has 32-bit values that Pillow reads as negative: save them as .npy")
            image = ImageOps.exif_transpose(image)
            if image.mode in DEEP:
                if "transparency" in image.info:
                    raise UserError(
                        f"{option}: {path} has transparent pixels and more than 8 bits: save it without transparency"
                    )
                return np.asarray(image)[None], False
            image, transparent = flattened(image)
            pixels = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError, *BROKEN) as error:
        raise UserError(
            f"{option}: {path} is truncated, or not an image that Pillow reads ({first_line(error)})"
        ) from None
    return (pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))), transparent


def flattened(image: Any) -> tuple[Any, bool]:
    """(The picture in 8-bit grey or colour, whether it had transparent pixels, now drawn on white)."""
    from PIL import Image

    if image.mode not in ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise ValueError(f"the kind {image.mode}")
    grey = image.mode in ("1", "L", "LA", "La")
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


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """The resized picture, in floating point: rounding to the file's levels would lose the edges of a 0/1 mask."""
    from PIL import Image

    channels = [
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR))
        for channel in pixels
    ]
    return np.stack(channels).clip(pixels.min(), pixels.max())


def depth(pixels: np.ndarray) -> str:
    kinds = {1: "8 bits", 2: "16 bits", 4: "32 bits"}
    return "floating point" if pixels.dtype.kind == "f" else kinds[pixels.dtype.itemsize]


def hidden(place: Path) -> bool:
    """Whether the path is a hidden file or folder, such as a system's copy of a picture."""
    return any(part.startswith(".") or part == "__MACOSX" for part in place.parts)


def shortened(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
