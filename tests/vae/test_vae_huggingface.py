"""Data sets saved by Hugging Face's `datasets`, read from the disk."""

from __future__ import annotations

import numpy as np
import pytest

from fastkl.vae import data
from fastkl.vae.data.stored import Stored
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

from vae_helpers import BARE, assert_same_state, refused, train, write_pictures

datasets = pytest.importorskip("datasets", reason="needs datasets (fastkl[data])")
datasets.disable_progress_bars()
NAMES = ["ant", "bee", "cow"]


def load(path, **settings) -> data.Data:
    return data.load(Settings(data=str(path), **settings))


def images(folder, count: int = 20, seed: int = 0):
    """A data set of the pictures that are then in the folder."""
    write_pictures(folder, count, seed=seed)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    files = [{"bytes": file.read_bytes(), "path": None} for file in sorted(folder.iterdir())]
    columns = {"img": files, "label": [index % 3 for index in range(count)]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_images_are_those_of_the_files(tmp_path):
    images(tmp_path / "x").save_to_disk(tmp_path / "saved")
    loaded, folder = load(tmp_path / "saved"), load(tmp_path / "x")
    assert isinstance(loaded.train, Stored)
    assert loaded.train[:].equal(folder.train)
    assert loaded.test.equal(folder.test)
    assert loaded.label_names == NAMES
    assert loaded.train_labels.tolist() == (loaded.train.rows % 3).tolist()
    assert loaded.notes == ("column img: 20 images, decoded when they are used",)


def test_splits_are_parts_and_training_reads_them_in_workers(tmp_path):
    both = {"train": images(tmp_path / "x", 40), "test": images(tmp_path / "y", 12, seed=1)}
    datasets.DatasetDict({**both, "extra": both["test"]}).save_to_disk(tmp_path / "saved")
    loaded = load(tmp_path / "saved", crop=6)
    assert (len(loaded.train), len(loaded.test), loaded.shape) == (40, 12, (3, 6, 6))
    assert "splits left out: extra" in loaded.notes
    chosen = (*BARE, "--data", str(tmp_path / "saved"), "--crop", "6", "--flip", "--batch-size", "16")
    for workers in "02":
        assert train(tmp_path / f"run{workers}", *chosen, "--workers", workers) == 0
    assert_same_state(tmp_path / "run0", tmp_path / "run2")


@pytest.mark.parametrize("kind", ["lists", "arrays", "bytes"])
def test_a_column_of_numbers_is_an_array(tmp_path, kind):
    shape = (5,) if kind == "lists" else (4, 6)
    values = (np.random.default_rng(0).random((20, *shape)) * 250).astype(np.uint8 if kind == "bytes" else np.float32)
    features = None
    if kind != "lists":
        array = datasets.Array2D(shape, str(values.dtype))
        features = datasets.Features({"x": array, "y": datasets.Value("int64")})
    columns = {"x": values.tolist(), "y": [7, 9] * 10}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    np.save(tmp_path / "x.npy", values)
    loaded, one = load(tmp_path / "saved"), load(tmp_path / "x.npy")
    np.testing.assert_array_equal(loaded.train[:].numpy(), one.train.numpy())
    assert loaded.test.equal(one.test)
    assert loaded.label_names == ["7", "9"]


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    saved, chosen = tmp_path / "saved", ("--data", str(tmp_path / "saved"))
    datasets.Dataset.from_dict({"text": ["a"] * 20}).save_to_disk(saved)
    assert "expected one column of images" in refused(capsys, tmp_path / "run", *chosen)
    none = datasets.Features({"x": datasets.Sequence(datasets.Value("float32"))})
    datasets.Dataset.from_dict({"x": []}, features=none).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="none: a data set without rows"):
        load(tmp_path / "none")
    whole = images(tmp_path / "x")
    broken = datasets.Dataset.from_dict(
        {"img": [*whole.cast_column("img", datasets.Image(decode=False))["img"][:19], {"bytes": b"?", "path": None}]},
        features=datasets.Features({"img": datasets.Image()}),
    )
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(UserError, match="the image of row 19 is truncated, or not an image"):
        load(tmp_path / "broken")
    whole.save_to_disk(tmp_path / "cut")
    file = next((tmp_path / "cut").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="cut: truncated, or not a"):
        load(tmp_path / "cut")
    ragged = datasets.Dataset.from_dict({"x": [[1.0] * (5 + (index == 7)) for index in range(20)]})
    ragged.save_to_disk(tmp_path / "ragged")
    with pytest.raises(UserError, match="arrays of different shapes"):
        load(tmp_path / "ragged")
