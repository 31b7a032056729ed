"""Random crops and flips: squares of the pictures, functions of seed, epoch and datum; and the photographs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle

import numpy as np
import pytest
import torch

from fastkl import vae
from fastkl.vae import data, prior
from fastkl.vae import run as runs
from fastkl.vae.cli import main
from fastkl.vae.data import builtin
from fastkl.vae.data.image_sets import Crops
from fastkl.vae.data.images import read_image
from fastkl.vae.data.stored import Stored
from fastkl.vae.errors import UserError
from fastkl.vae.parallel import Ranks
from fastkl.vae.rules import resolve
from fastkl.vae.settings import Settings

from vae_helpers import BARE, refused, scaling, train, write_pictures

RANDOM = np.random.default_rng(5)


def coordinates(count: int, height: int, width: int) -> np.ndarray:
    """Pictures whose channels are the number of the picture, the row and the column."""
    return np.stack(np.broadcast_arrays(*np.ogrid[:count, :height, :width]), 1).astype(np.float32)


def stored(source, flip: bool = False, seed: int = 0) -> Stored:
    return Stored(source, np.arange(len(source)), scaling("poisson"), flip=flip, random=True, seed=seed)


def test_crops_are_squares_of_the_picture_at_every_place_alike():
    count, epochs, crop = 40, 60, 5
    views = stored(Crops(coordinates(count, 8, 6), crop, 0, "x"), flip=True)
    seen, flips = np.zeros((4, 2)), 0
    for epoch in range(epochs):
        x = views.view(torch.arange(count), epoch).numpy().astype(int)
        top, left = x[:, 1].min((1, 2)), x[:, 2].min((1, 2))
        turned = x[:, 2, 0, 0] > x[:, 2, 0, -1]
        steps = np.where(turned[:, None], np.arange(crop)[::-1], np.arange(crop))
        assert (x[:, 0] == np.arange(count)[:, None, None]).all()
        assert (x[:, 1] == top[:, None, None] + np.arange(crop)[:, None]).all()
        assert (x[:, 2] == left[:, None, None] + steps[:, None]).all()
        np.add.at(seen, (top, left), 1)
        flips += turned.sum()
    total = count * epochs
    assert abs(flips / total - 0.5) < 5 * 0.5 / np.sqrt(total)
    assert abs(seen / total - 1 / 8).max() < 5 * np.sqrt(1 / 8 / total), "all eight places are as frequent"


def test_a_crop_depends_on_seed_epoch_and_datum_alone():
    views = stored(pickle.loads(pickle.dumps(Crops(RANDOM.random((30, 3, 9, 9)), 4, 0, "x"))), flip=True)
    order = torch.randperm(30)
    whole = views.view(order, 3)
    parts = [views.view(part, 3) for part in order.split([1, 4, 25])]
    assert torch.cat(parts).equal(whole)
    assert views[:].equal(views.view(torch.arange(30), 0))
    assert not views.view(order, 4).equal(whole)
    assert not stored(views.source, True, seed=1).view(order, 3).equal(whole)


def test_test_data_are_centre_crops_without_flips(tmp_path):
    np.save(tmp_path / "x.npy", RANDOM.integers(0, 256, (40, 3, 9, 8)).astype(np.uint8))
    given = Settings(data=str(tmp_path / "x.npy"), crop=4, flip=True, validation=0.2)
    loaded, plain = data.load(given), data.load(Settings(data=str(tmp_path / "x.npy"), validation=0.2))
    assert loaded.test.equal(plain.test[..., 2:6, 2:6])
    assert loaded.validation.equal(plain.validation[..., 2:6, 2:6])
    assert loaded.shape == (3, 4, 4)
    assert "training images are cropped at random to 4 x 4 and flipped at random" in loaded.notes


@pytest.mark.parametrize("sides", [(64, 128), (128, 64)], ids=["wide", "high"])
def test_resizing_keeps_proportions(sides):
    """A picture of slopes has the same slopes on a coarser grid, so its values show where each pixel was."""
    crops = Crops(coordinates(1, *sides), 8, 16, "x")  # the shorter side from 64 to 16: each pixel stands for 4 x 4
    centre = crops[:][0]
    last = crops.random(np.array([0]), np.ones((1, 2)))[0]
    for channel, side in enumerate(sides, 1):
        inner = 4 * np.arange(1, 7) + 1.5  # at the edge the filter has fewer neighbours
        along = [picture[channel].mean(2 - channel)[1:-1] for picture in (centre, last)]
        np.testing.assert_allclose(along[0], 4 * ((side // 4 - 8) // 2) + inner, atol=0.02)
        np.testing.assert_allclose(along[1], side - 32 + inner, atol=0.02)


def test_pictures_of_different_sizes_are_cropped(tmp_path, capsys):
    write_pictures(tmp_path / "x", 12, (9, 9))
    write_pictures(tmp_path / "y", 12, (12, 10))
    for index, file in enumerate(sorted((tmp_path / "y").iterdir())):
        file.rename(tmp_path / "x" / f"y{index:02}.png")
    chosen = ("--data", str(tmp_path / "x"))
    assert "or --crop to cut out squares" in refused(capsys, tmp_path / "run", *chosen)
    assert data.load(Settings(data=str(tmp_path / "x"), crop=8)).shape == (3, 8, 8)
    assert data.load(Settings(data=str(tmp_path / "x"), crop=8, image_size=30)).train[:].shape == (20, 3, 8, 8)
    error = refused(capsys, tmp_path / "run", *chosen, "--crop", "10")
    assert "--crop 10 is larger than an image of 9 x 9 (" in error
    assert "000.png" in error
    assert "--image-size 10 resizes the shorter sides" in error
    assert "the shorter side after resizing" in refused(capsys, tmp_path / "run", "--crop", "9", "--image-size", "8")


def test_vectors_are_neither_cropped_nor_flipped(tmp_path, capsys):
    np.save(tmp_path / "x.npy", RANDOM.random((20, 64)))
    for option in (("--crop", "4"), ("--flip",)):
        assert "needs images, got rows of 64 numbers" in refused(
            capsys, tmp_path / "run", "--data", str(tmp_path / "x.npy"), *option
        )


@pytest.mark.parametrize("kind", ["gmm", "vamp"])
def test_learned_priors_start_from_views_of_the_first_epoch(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(prior, "DRAWS", 100)
    write_pictures(tmp_path / "x", 60, (9, 9))
    given = {
        "data": str(tmp_path / "x"),
        "crop": 8,
        "prior": kind,
        "components": 3,
        "hidden": 16,
        "latent": 2,
        "warm_up": 2,
    }
    settings = resolve({**given, "batch_size": 16})
    run = runs.start(settings, loaded := data.load(settings), Ranks(), tmp_path)
    if kind == "vamp":
        of = prior.pseudo_inputs(settings, loaded)
        assert all(any(one.equal(view) for view in loaded.train.view(np.arange(48), 0)) for one in of)
    before = [value.clone() for value in run.vae.prior.parameters()]
    prior.initialise(run.vae.prior, run.vae, loaded, settings, run.device)
    same = all(one.equal(other) for one, other in zip(before, run.vae.prior.parameters()))
    assert same == (kind == "vamp")


def test_a_trained_model_takes_cropped_and_larger_images(tmp_path, capsys):
    pixels = write_pictures(tmp_path / "x", 40, (12, 9))
    chosen = ("--data", str(tmp_path / "x"), "--crop", "8", "--image-size", "9", "--batch-size", "16")
    assert train(tmp_path / "run", *BARE, *chosen) == 0
    model, images = vae.load(tmp_path / "run"), pixels.transpose(0, 3, 1, 2)
    z = model.encode(images)
    assert model.encode(images[..., 2:10, 0:8]).equal(z), "images of the model's own size are taken as they are"
    assert model.encode(pixels).equal(z)
    with pytest.raises(UserError, match="x must be data of shape"):
        model.encode(images[:, :1])
    capsys.readouterr()
    assert main(["encode", str(tmp_path / "run"), str(tmp_path / "x"), "--out", str(tmp_path / "z.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), z.numpy())
    capsys.readouterr()
    figures = []
    for given in ((), ("--data", str(tmp_path / "x"))):
        assert main(["evaluate", str(tmp_path / "run"), "--importance-samples", "2", *given]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert [figure["test_data"] for figure in figures] == [8, 40]
    assert abs(figures[0]["elbo"] - figures[1]["elbo"]) < 5


# Found, but not imported: only files of these packages are read, so their own dependencies are not needed.
HAVE = all(importlib.util.find_spec(package) for package in ("skimage", "PIL", "sklearn"))
needs_photographs = pytest.mark.skipif(not HAVE, reason="needs scikit-image, scikit-learn and pillow")


@needs_photographs
def test_photographs_are_tested_on_pixels_that_no_crop_shows():
    """Every training crop is found in the left part of a photograph, and every test square in the right fifth."""
    photos = data.load(resolve({"data": "photos"}))
    assert photos.shape == (3, 64, 64)
    assert len(photos.train) == builtin.CROPS
    assert photos.likelihood == "logistic"
    assert (photos.scaling.levels, photos.label_names) == (256, None)
    pictures = [
        read_image(builtin.inside(package, path, "", install), "")[0]
        for package, install, path in builtin.PHOTOS.values()
    ]

    def found(square: torch.Tensor) -> tuple[int, int]:
        square = (square * 255).round().numpy().astype(np.uint8)
        for index, picture in enumerate(pictures):
            height, width = picture.shape[1:]
            first = np.ones((height - 63, width - 63), bool)
            for row, column in ((0, 0), (40, 63), (63, 20), (63, 63)):
                corner = picture[:, row : height - 63 + row, column : width - 63 + column]
                first &= (corner == square[:, row, column, None, None]).all(0)
            for top, left in np.argwhere(first):
                if (picture[:, top : top + 64, left : left + 64] == square).all():
                    return index, left
        raise AssertionError("no square of a photograph")

    splits = [picture.shape[2] - max(64, int(0.2 * picture.shape[2])) for picture in pictures]
    assert all(left >= splits[index] for index, left in map(found, photos.test))
    views = dataclasses.replace(photos.train, flip=False).view(np.arange(0, builtin.CROPS, 200), 1)
    places = list(map(found, views))
    assert {index for index, _ in places} == set(range(7)), "every photograph is trained on"
    assert all(left + 64 <= splits[index] for index, left in places)


@needs_photographs
def test_photographs_need_a_crop_that_fits(tmp_path, capsys):
    assert "needs --crop" in refused(capsys, tmp_path / "run", "--data", "photos", "--crop", "0")
    small = refused(capsys, tmp_path / "run", "--data", "photos", "--crop", "260", "--image-size", "300")
    assert "use a smaller one, or a larger --image-size" in small
    assert len(data.load(resolve({"data": "photos", "crop": 200})).test) >= 10
    enlarged = data.load(resolve({"data": "photos", "image_size": 256}))
    assert enlarged.shape == (3, 256, 256)
    assert len(enlarged.test) >= 10
    small = data.load(resolve({"data": "photos", "crop": 32, "image_size": 100, "flip": False}))
    assert small.shape == (3, 32, 32)
    assert 20 < len(small.test) < 60
