"""The loader infers what it needs from the data's range and layout, and reports it; anything else is refused."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch

from fastkl.vae import data
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

from vae_helpers import write_pictures

RANDOM = np.random.default_rng(1)
COUNT = 12


def load(path, **settings) -> data.Data:
    return data.load(Settings(data=str(path), **settings))


def everything(loaded: data.Data) -> np.ndarray:
    return torch.cat([loaded.train, loaded.test]).numpy()


def assert_same_rows(found: np.ndarray, expected: np.ndarray) -> None:
    """In whatever order."""
    found, expected = (np.asarray(rows, dtype=np.float32).reshape(len(rows), -1) for rows in (found, expected))
    np.testing.assert_allclose(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)], rtol=1e-5, atol=1e-6)


def write_images(folder, arrays, suffix=".tif"):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(arrays):
        image.fromarray(pixels).save(folder / f"{index:02}{suffix}")
    return folder


def png(pixels: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits, which Pillow can write in grey alone; `colour` as in the format's table."""
    height, width = pixels.shape[:2]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def whole(high: int, dtype: type, shape=(COUNT, 8, 8)) -> np.ndarray:
    values = RANDOM.integers(0, high + 1, shape).astype(dtype)
    values.flat[0], values.flat[1] = high, 0
    return values


# Deep files: bits used, type, and what a pixel is divided by.
DEEP = {
    "12 of 16 bits": (whole(4095, np.uint16), 4095),
    "12 bits, no pixel white": (whole(3000, np.uint16), 4095),
    "16 bits": (whole(65535, np.uint16), 65535),
    "bytes in 32 bits": (whole(255, np.int32), 255),
    "16 bits in 32": (whole(40000, np.int32), 65535),
    "a mask": (whole(1, np.uint8), 1),
    "four bits": (whole(15, np.uint8), 15),
    "bytes": (whole(255, np.uint8), 255),
    "bytes, none white": (whole(200, np.uint8), 255),
    "shades": (RANDOM.random((COUNT, 8, 8), dtype=np.float32), 1),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("form", ["folder", "npy"])
def test_every_level_of_a_pixel_is_kept(tmp_path, kind, form):
    pixels, by = DEEP[kind]
    if form == "folder":
        path = write_images(tmp_path / "pictures", pixels)
    else:
        path = tmp_path / "x.npy"
        np.save(path, pixels)
    loaded = load(path)
    assert loaded.likelihood == "bernoulli"
    assert_same_rows(everything(loaded), pixels.astype(np.float64) / by)
    assert f"from 0 to {pixels.max()}" in loaded.values or by == 1
    assert by == 1 or f"divided by {by}" in loaded.values


def test_png_of_16_bits(tmp_path):
    pixels = whole(4095, np.uint16)
    for index, one in enumerate(pixels):
        (tmp_path / f"{index}.png").write_bytes(png(one, 0))
    assert_same_rows(everything(load(tmp_path)), pixels / 4095)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colour_of_16_bits_is_refused_not_cut_to_8(tmp_path, colour, channels):
    pytest.importorskip("PIL")
    for index, one in enumerate(whole(4095, np.uint16, (COUNT, 8, 8, channels))):
        (tmp_path / f"{index}.png").write_bytes(png(one, colour))
    with pytest.raises(UserError, match=r"0\.png is a colour picture with more than 8 bits"):
        load(tmp_path)


def test_float_pictures_of_another_range_are_standardised(tmp_path):
    for low, high in ((0, 255), (-1, 1), (0, 1e-4)):
        pixels = (RANDOM.random((COUNT, 8, 8)) * (high - low) + low).astype(np.float32)
        loaded = load(write_images(tmp_path / "pictures", pixels))
        assert loaded.likelihood == "normal"
        assert loaded.train.std().item() == pytest.approx(1, abs=1e-4)
        assert len(np.unique(everything(loaded))) > 0.9 * pixels.size


def test_a_mask_keeps_its_edges_when_it_is_resized(tmp_path):
    loaded = load(write_images(tmp_path / "pictures", whole(1, np.uint8, (COUNT, 16, 16))), image_size=8)
    assert loaded.shape == (1, 8, 8)
    assert len(loaded.train.unique()) > 10
    assert 0.3 < loaded.train.mean() < 0.7


def test_folders_of_mixed_depths_animations_and_transparency(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = write_images(tmp_path / "pictures", whole(255, np.uint8))
    image.fromarray(whole(4095, np.uint16)[0]).save(folder / "deep.tif")
    with pytest.raises(UserError, match=r"00\.tif \(8 bits\), deep\.tif \(16 bits\)"):
        load(folder)
    first, *more = (image.fromarray(pixels) for pixels in whole(255, np.uint8))
    first.save(folder / "deep.tif", save_all=True, append_images=more)
    with pytest.raises(UserError, match=r"deep\.tif holds 12 pictures"):
        load(folder)
    (folder / "deep.tif").unlink()
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "copy.tif").write_bytes(b"none of the pictures")
    half = np.zeros((8, 8, 4), np.uint8)
    half[:4, :, 3] = 255  # black above; what is below cannot be seen, and its colour is anything
    image.fromarray(half).save(folder / "half.png")
    loaded = load(folder)
    (picture,) = (row for row in everything(loaded) if row[:, :4].max() == 0)
    assert picture[:, 4:].min() == 1
    assert "1 with transparent pixels, drawn on white" in loaded.note


def test_pictures_are_turned_as_the_camera_was_held(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = whole(255, np.uint8)
    for index, one in enumerate(pixels):
        exif = image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        image.fromarray(one).save(tmp_path / f"{index:02}.png", exif=exif)
    assert_same_rows(everything(load(tmp_path)), np.rot90(pixels, -1, (1, 2)) / 255)


LAYOUTS = {
    "channels last": ((COUNT, 8, 6, 3), (3, 8, 6), (0, 3, 1, 2)),
    "with opacity": ((COUNT, 8, 8, 4), (4, 8, 8), (0, 3, 1, 2)),
    "two channels last": ((COUNT, 9, 8, 2), (2, 9, 8), (0, 3, 1, 2)),
    "channels first": ((COUNT, 3, 8, 6), (3, 8, 6), (0, 1, 2, 3)),
    "a latent": ((COUNT, 16, 8, 8), (16, 8, 8), (0, 1, 2, 3)),
    "a latent, channels last": ((COUNT, 8, 8, 16), (16, 8, 8), (0, 3, 1, 2)),
    "a narrow picture": ((COUNT, 1, 8, 8), (1, 8, 8), (0, 1, 2, 3)),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(tmp_path, kind):
    shape, datum, axes = LAYOUTS[kind]
    values = RANDOM.random(shape)
    np.save(tmp_path / "x.npy", values)
    loaded = load(tmp_path / "x.npy")
    assert loaded.shape == datum
    assert_same_rows(everything(loaded), values.transpose(axes))
    assert ("channels last" in loaded.note.lower()) == (axes != (0, 1, 2, 3))


@pytest.mark.parametrize("shape", [(COUNT, 3, 8, 3), (COUNT, 3, 3, 3), (28, 28, 100), (32, 32, 3, 100)])
def test_layouts_that_cannot_be_told_are_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", RANDOM.random(shape))
    with pytest.raises(UserError, match=r"is ambiguous|N last"):
        load(tmp_path / "x.npy")


def test_vectors_of_whole_numbers(tmp_path):
    """Flattened bytes are pixels, zeros and ones are chances; other counts have units of their own."""
    for high, likelihood in ((255, "bernoulli"), (1, "bernoulli"), (30, "normal"), (3000, "normal")):
        values = whole(high, np.int64, (40, 6))
        np.save(tmp_path / "x.npy", values)
        loaded = load(tmp_path / "x.npy")
        assert loaded.likelihood == likelihood
        if likelihood == "bernoulli":
            assert_same_rows(everything(loaded), values / high)
    asked = load(tmp_path / "x.npy", likelihood="bernoulli")
    assert_same_rows(everything(asked), values / 4095)


def test_large_and_small_numbers_keep_their_digits(tmp_path):
    """A date in seconds or a distance in light-years is no constant, though float32 makes it one."""
    units = np.array([1.0, 1e-9, 1e9])
    values = RANDOM.normal(size=(50, 3)) * units + np.array([1.7e12, 0, 0])
    np.save(tmp_path / "x.npy", values)
    loaded = load(tmp_path / "x.npy")
    np.testing.assert_allclose(loaded.train.std(0), np.ones(3), rtol=1e-3)
    np.save(tmp_path / "x.npy", (values * 1e3).astype(np.int64))
    np.testing.assert_allclose(load(tmp_path / "x.npy").train.std(0)[[0, 2]], np.ones(2), rtol=1e-3)


def test_constants_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.full((20, 8, 8), 7, np.uint8))
    with pytest.raises(UserError, match="all values are 7"):
        load(tmp_path / "x.npy")


def split_files(folder, x, y, test_x, test_y, kind):
    tensors = [torch.from_numpy(array) for array in (x, y, test_x, test_y)]
    if kind == "npz":
        np.savez(folder / "d.npz", x_train=x, y_train=y, x_test=test_x, y_test=test_y)
    elif kind == "npz, other names":
        np.savez(folder / "d.npz", train_images=x, train_labels=y[:, None], test_images=test_x, test_labels=test_y)
    elif kind == "pt of pairs":
        torch.save(((tensors[0], tensors[1]), (tensors[2], tensors[3])), folder / "d.pt")
    elif kind == "pt, nested":
        torch.save({"train": {"x": tensors[0], "y": y.tolist()}, "test": tuple(tensors[2:])}, folder / "d.pt")
    elif kind == "folders":
        image = pytest.importorskip("PIL.Image")
        for part, values, labels in (("train", x, y), ("test", test_x, test_y)):
            for index, (pixels, label) in enumerate(zip(values, labels)):
                place = folder / part / str(label)
                place.mkdir(parents=True, exist_ok=True)
                image.fromarray(pixels).save(place / f"{index}.png")
        return {"data": str(folder)}
    elif kind == "two files":
        np.savez(folder / "d.npz", x=x, y=y)
        torch.save((tensors[2], tensors[3]), folder / "t.pt")
        return {"data": str(folder / "d.npz"), "test_data": str(folder / "t.pt")}
    return {"data": str(folder / ("d.pt" if kind.startswith("pt") else "d.npz"))}


@pytest.mark.parametrize("kind", ["npz", "npz, other names", "pt of pairs", "pt, nested", "folders", "two files"])
def test_test_data_that_are_given_are_those_tested(tmp_path, kind):
    x, test_x = whole(255, np.uint8, (20, 8, 8)), whole(250, np.uint8, (7, 8, 8))
    y, test_y = np.arange(20) % 3, np.arange(7) % 2
    loaded = data.load(Settings(**split_files(tmp_path, x, y, test_x, test_y, kind)))
    assert_same_rows(loaded.train, x / 255)
    assert_same_rows(loaded.test, test_x / 255)
    assert loaded.label_names == ["0", "1", "2"]
    assert sorted(loaded.test_labels.tolist()) == sorted(test_y)
    for picture, label in zip(loaded.test, loaded.test_labels):
        (index,) = np.flatnonzero((np.abs(picture[0].numpy() - test_x / 255) < 1e-6).all((1, 2)))
        assert label == test_y[index]


def test_a_folder_around_all_groups_is_none(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for index, pixels in enumerate(whole(255, np.uint8)):
        place = tmp_path / "train" / ("cat", "dog")[index % 2] / "more"
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(place / f"{index}.png")
    assert load(tmp_path).label_names == ["cat", "dog"]


def test_validation_data(tmp_path):
    x = whole(255, np.uint8, (40, 8, 8))
    np.savez(tmp_path / "x.npz", x=x)
    loaded = load(tmp_path / "x.npz", validation=0.25)
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [24, 8, 8]
    assert loaded.watched is loaded.validation
    assert_same_rows(torch.cat([loaded.train, loaded.validation, loaded.test]), x / 255)
    np.savez(tmp_path / "x.npz", x=x, x_val=x[:5], x_test=x[:9])
    np.savez(tmp_path / "y.npz", x=x)
    given = load(tmp_path / "x.npz")
    assert [len(part) for part in (given.train, given.validation, given.test)] == [40, 5, 9]
    with pytest.raises(UserError, match="is the same file as --data"):
        data.load(Settings(data=str(tmp_path / "y.npz"), test_data=str(tmp_path / "z" / ".." / "y.npz")))
    for bad in ({"validation": 0.5}, {"test_data": str(tmp_path / "x.npz")}):
        with pytest.raises(UserError, match="already holds"):
            load(tmp_path / "x.npz", **bad)


def test_parts_in_different_units_are_refused(tmp_path):
    x = whole(255, np.uint8, (20, 8, 8))
    for test_x in (x / 255, whole(1, np.uint8, (20, 8, 8)), whole(4095, np.uint16, (20, 8, 8))):
        np.savez(tmp_path / "x.npz", x_train=x, x_test=test_x)
        with pytest.raises(UserError, match="the same scale"):
            load(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x[:, :6])
    with pytest.raises(UserError, match=r"expected test data of shape \[1, 8, 8\] .* got \[1, 6, 8\]"):
        load(tmp_path / "x.npz")


TUPLES = {
    "images and labels": lambda x, y: (x, y),
    "a list of images": lambda x, y: list(x),
    "a list of pairs": lambda x, y: list(zip(x, y.tolist())),
    "images alone": lambda x, y: [x],
    "a sparse tensor": lambda x, y: x.to_sparse(),
}


@pytest.mark.parametrize("kind", TUPLES)
def test_tuples_and_lists_of_tensors(tmp_path, kind):
    x = whole(255, np.uint8, (20, 8, 8))
    torch.save(TUPLES[kind](torch.from_numpy(x), torch.arange(20) % 2), tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt")
    assert_same_rows(everything(loaded), x / 255)
    assert (loaded.test_labels is not None) == ("labels" in kind or "pairs" in kind)


def test_what_is_left_out_is_said(tmp_path):
    x = whole(255, np.uint8, (20, 8, 8))
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(20) / 7, masks=x)
    said = load(tmp_path / "x.npz").note
    assert "masks" in said
    assert "Labels of the train data left out" in said
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(5))
    with pytest.raises(UserError, match="20 train data, but labels of shape"):
        load(tmp_path / "x.npz")
    torch.save((torch.zeros(20, 3), torch.zeros(20, 3), torch.zeros(5)), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"expected \(images, labels\)"):
        load(tmp_path / "x.pt")
    hot = np.eye(2)[np.arange(20) % 2]
    np.savez(tmp_path / "x.npz", x=x, y=hot)
    assert load(tmp_path / "x.npz").label_names == ["0", "1"]


def test_linked_folders_are_read_and_loops_end(tmp_path):
    for name in ("cats", "dogs"):
        write_pictures(tmp_path / "elsewhere" / name, 12)
    (tmp_path / "x").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "x" / name).symlink_to(tmp_path / "elsewhere" / name)
        (tmp_path / "elsewhere" / name / "around").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "all").symlink_to(tmp_path)
    loaded = load(tmp_path / "x")
    assert loaded.label_names == ["cats", "dogs"]
    assert loaded.counts == "20 training, 4 test"


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, stream):
    write_pictures(tmp_path / "x" / "a", 12)
    write_pictures(tmp_path / "x" / "b", 12)
    scan = os.scandir

    def denied(path):  # not by its mode, because an administrator may read all
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"^--data: .*x/b cannot be read \(Permission denied\)$"):
        load(tmp_path / "x", stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_the_reason_why_a_picture_cannot_be_read_is_said(tmp_path, stream):
    write_pictures(tmp_path / "x", 12)
    (tmp_path / "x" / "y.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"y.png cannot be read \(No such file or directory\)$"):
        load(tmp_path / "x", stream=stream)
    (tmp_path / "x" / "y.png").unlink()
    (tmp_path / "x" / "y.png").write_text("not a picture")
    with pytest.raises(UserError, match=r"y.png is truncated, or not an image that Pillow reads$"):
        load(tmp_path / "x", stream=stream)
    for name in ("a/000.png", "a/001.png"):
        (tmp_path / "x" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"")
    more = "a/000.png is truncated, or not an image that Pillow reads; 2 more cannot be read: .*a/001.png, .*y.png$"
    with pytest.raises(UserError, match=more):
        load(tmp_path / "x", stream=stream)
    shutil.rmtree(tmp_path / "x" / "a")
    if hasattr(os, "mkfifo"):
        (tmp_path / "x" / "y.png").unlink()
        os.mkfifo(tmp_path / "x" / "y.png")
        with pytest.raises(UserError, match=r"y.png is not a regular file$"):
            load(tmp_path / "x", stream=stream)
