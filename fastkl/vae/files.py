"""Reading data files that nobody vouches for: nothing in them is run, and what is wrong is said in one line."""

from __future__ import annotations

import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkl.vae.errors import UserError, require

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
VALUE_NAMES = ("x", "images", "data", "x_train", "values", "arr_0")
LABEL_NAMES = ("y", "labels", "label", "targets", "target", "y_train", "arr_1")
# What numpy, zipfile and torch raise on files that are cut short, empty, of another kind, or that lie about their size.
# A RuntimeError also covers torch's zip reader; pickle.UnpicklingError is how weights_only refuses code.
BROKEN = (
    ValueError, EOFError, LookupError, RuntimeError, MemoryError, OverflowError, TypeError, AttributeError,
    zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
)  # fmt: skip


def read(path: Path, image_size: int = 0) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """(values, labels or None, names of the labels or None)."""
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder, and no built-in data set of that name")
    if path.is_dir():
        return read_folder(path, image_size)
    readers = {".npy": read_npy, ".npz": read_npz, ".pt": read_pt}
    if path.suffix.lower() not in readers:
        raise UserError(f"--data {path}: expected a .npy, .npz or .pt file or a folder of images")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"--data {path}: the file is empty")
        values, labels = readers[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read ({error.strerror or first_line(error)})") from None
    except BROKEN as error:
        kind = f"{path.suffix} file of plain arrays"
        raise UserError(f"--data {path}: truncated, or not a {kind} ({first_line(error)})") from None
    return values, labels, None


def read_npy(path: Path) -> tuple[np.ndarray, None]:
    # Mapping the file compares its length with what the header promises before any memory is taken.
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False)), None


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    with np.load(path, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array; call it .npy")
        return choose({name: archive[name] for name in archive.files}, path)


def read_pt(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    held = load_tensors(path)
    held = held if isinstance(held, dict) else {"x": held}
    arrays = {str(name): value for name, value in held.items() if isinstance(value, torch.Tensor)}
    # NumPy has no bfloat16; float32 holds every value of it.
    arrays = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in arrays.items()}
    return choose({name: value.detach().numpy() for name, value in arrays.items()}, path)


def load_tensors(path: Path) -> Any:
    """What torch.save wrote, tensors and plain containers only; quietly, for an error that follows says it better."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def choose(arrays: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The values and the labels among named arrays."""
    by_name = {name.lower(): array for name, array in arrays.items()}
    labels = next((by_name[name] for name in LABEL_NAMES if name in by_name), None)
    values = next((by_name[name] for name in VALUE_NAMES if name in by_name), None)
    if values is None and len(arrays) == 1:
        values = next(iter(arrays.values()))
    if values is None:
        listed = ", ".join(sorted(arrays)) or "none"
        raise UserError(f"--data {path}: no array called {', '.join(VALUE_NAMES[:3])} among those it holds ({listed})")
    return values, labels


def read_folder(path: Path, image_size: int) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """Every image below the folder, in sorted order; the names of its subfolders are the labels, if all are in one."""
    names = sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGES and item.is_file())
    if not names:
        raise UserError(f"--data {path}: no images in this folder ({', '.join(IMAGES)})")
    require("PIL", "Reading images")
    images = [read_image(name, image_size) for name in names]
    shapes = {image.shape[1:] for image in images}
    if len(shapes) > 1:
        raise UserError(f"--data {path}: images of {len(shapes)} different sizes; give --image-size to resize them")
    if len({image.shape[0] for image in images}) > 1:  # grey and colour mixed: grey becomes colour
        images = [np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image for image in images]
    groups = sorted({name.parent.name for name in names if name.parent != path})
    if len(groups) < 2 or any(name.parent == path for name in names):
        return np.stack(images), None, None
    return np.stack(images), np.array([groups.index(name.parent.name) for name in names]), groups


def read_image(path: Path, image_size: int) -> np.ndarray:
    """[1 or 3, height, width] of bytes."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits: PIL's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            image = image.convert("L" if image.mode in ("1", "L", "F") else "RGB")
            if image_size:
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError, *BROKEN) as error:
        raise UserError(f"--data: {path} is truncated, or not an image ({first_line(error)})") from None
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to stand in parentheses."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
