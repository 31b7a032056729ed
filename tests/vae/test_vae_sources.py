"""Shards, tar archives and Hugging Face data sets: every row is that of its file, and damage is named before a run."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkl.vae import data
from fastkl.vae.data.arrays import Span, blocks
from fastkl.vae.data.scaling import Scaling
from fastkl.vae.data.shards import Shards
from fastkl.vae.data.stored import Stored
from fastkl.vae.errors import UserError
from fastkl.vae.settings import Settings

from vae_helpers import BARE, refused, train, write_pictures

RANDOM = np.random.default_rng(3)


def load(path: Path, **settings) -> data.Data:
    return data.load(Settings(data=str(path), **settings))


def write_shards(folder: Path, values: np.ndarray, counts=(7, 1, 12)) -> Path:
    folder.mkdir()
    for index, part in enumerate(np.split(values, np.cumsum(counts)[:-1])):
        np.save(folder / f"part-{index}.npy", part)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def tar_of(folder: Path, path: Path, first: int = 0, labels: bool = True) -> Path:
    members = {}
    for index, file in enumerate(sorted(folder.iterdir()), first):
        members[f"a/{index:03}.png"] = file.read_bytes()
        if labels:
            members[f"a/{index:03}.cls"] = str(index % 3).encode()
        members[f"a/{index:03}.json"] = b"{}"
    return write_tar(path, members)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, ">u2", np.bool_])
@pytest.mark.parametrize("shape", [(4,), (5, 3), (3, 4, 4)])
def test_shards_are_one_array(tmp_path, dtype, shape):
    values = (RANDOM.random((20, *shape)) * 300).astype(dtype)
    shards = pickle.loads(pickle.dumps(Shards(sorted(write_shards(tmp_path / "x", values).iterdir()), "--data")))
    assert (shards.shape, shards.dtype, shards.ndim, len(shards)) == (values.shape, values.dtype, values.ndim, 20)
    for key in (slice(3, 15, 2), [19, 0, 7, 7, 8], slice(None), np.arange(0), 7, -1 % 20):
        np.testing.assert_array_equal(shards[key], values[key])


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3), (3, 6, 6), (9,)], ids=str)
def test_shards_are_scaled_and_split_as_one_file_is(tmp_path, shape):
    values = RANDOM.normal(size=(20, *shape))
    np.save(tmp_path / "x.npy", values)
    one, shards = load(tmp_path / "x.npy"), load(write_shards(tmp_path / "x", values))
    assert isinstance(shards.train, Stored)
    assert shards.shape == one.shape
    assert shards.train[:].equal(one.train)
    assert shards.test.equal(one.test)
    assert shards.train[torch.tensor([3, 1])].equal(one.train[[3, 1]])


def test_parts_of_shards_are_subfolders(tmp_path):
    write_shards(tmp_path / "train", RANDOM.random((20, 5)))
    tests = RANDOM.random((20, 5))
    write_shards(tmp_path / "test", tests)
    loaded = load(tmp_path)
    assert len(loaded.train) == len(loaded.test) == 20
    found = loaded.test * torch.from_numpy(loaded.scaling.deviation) + torch.from_numpy(loaded.scaling.mean)
    np.testing.assert_allclose(np.sort(found.numpy(), axis=0), np.sort(tests, axis=0), rtol=1e-5)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


BAD_SHARDS = {
    "truncated": damage,
    "foreign": lambda path: path.write_bytes(b"PNG not an array" * 9),
    "expected rows [5] of float64": lambda path: np.save(path, np.zeros((4, 6))),
    "expected rows [5] of float64, as in": lambda path: np.save(path, np.zeros((4, 5), np.float32)),
    "not contiguous": lambda path: np.save(path, np.zeros((4, 5), order="F")),
    "not a .npy file": lambda path: np.save(path, np.array([{}] * 4), allow_pickle=True),
}


@pytest.mark.parametrize("expected", BAD_SHARDS)
def test_a_bad_shard_is_named_before_the_run(tmp_path, capsys, expected):
    folder = write_shards(tmp_path / "x", RANDOM.random((20, 5)))
    BAD_SHARDS[expected](folder / "part-1.npy")
    error = refused(capsys, tmp_path / "run", "--data", str(folder))
    assert expected.replace("foreign", "not a .npy file") in error
    assert "part-1.npy" in error


def test_a_shard_with_nan_is_refused_and_one_cut_during_the_run_is_named(tmp_path):
    values = RANDOM.random((20, 5))
    values[9, 2] = np.nan
    folder = write_shards(tmp_path / "x", values)
    with pytest.raises(UserError, match=r"1 rows with NaN or infinite values, the first is row 1 of part-2\.npy"):
        load(folder)
    shards = Shards(sorted(folder.iterdir()), "--data")
    damage(folder / "part-2.npy")
    np.testing.assert_array_equal(shards[:19], values[:19])
    with pytest.raises(UserError, match=r"--data .*part-2.npy: truncated at row 11"):
        shards[[3, 19]]
    (folder / "part-0.npy").unlink()
    with pytest.raises(UserError, match=r"part-0.npy: cannot be read \(No such file or directory\)"):
        shards[3]


def test_the_span_of_bytes_is_known_from_the_first_block(monkeypatch):
    monkeypatch.setattr("fastkl.vae.data.arrays.AT_ONCE", 10)
    values = RANDOM.integers(0, 128, (50, 5)).astype(np.uint8)
    values[0, 0] = 0
    seen = []
    counted = (seen.append(1) or block for block in blocks(values))
    assert Span.of_blocks(counted, values.dtype) == Span(True, 0, int(values.max()))
    assert len(seen) == 25, "dark pictures may have fewer levels, so all are looked at"
    values[3, 3] = 128
    assert Span.of_blocks((seen.append(1) or block for block in blocks(values)), values.dtype) == Span(True, 0, 255)
    assert len(seen) == 25 + 2


def test_tar_archives_hold_what_the_folder_holds(tmp_path):
    write_pictures(tmp_path / "first", 20)
    write_pictures(tmp_path / "second", 10, seed=1)
    (tmp_path / "tars").mkdir()
    tar_of(tmp_path / "first", tmp_path / "tars" / "a.tar")
    tar_of(tmp_path / "second", tmp_path / "tars" / "b.tar", 20)
    shutil.copytree(tmp_path / "first", tmp_path / "all" / "first")
    shutil.copytree(tmp_path / "second", tmp_path / "all" / "second")
    both, tars = load(tmp_path / "all"), load(tmp_path / "tars")
    assert tars.train[:].equal(both.train)
    assert tars.test.equal(both.test)
    assert tars.label_names == ["0", "1", "2"]
    assert tars.train_labels.tolist() == (tars.train.rows % 3).tolist()
    assert tars.notes == ("30 images, decoded when they are used", "other members left out: .json")
    assert load(tmp_path / "tars" / "a.tar").train.rows.max() < 20
    assert train(tmp_path / "run", *BARE, "--data", str(tmp_path / "tars"), "--batch-size", "8") == 0


@pytest.mark.parametrize("suffix", [".npy", ".tar"])
def test_what_lies_beside_shards_and_archives_is_said_to_be_left_out(tmp_path, suffix):
    write_pictures(tmp_path / "x", 20)
    if suffix == ".tar":
        tar_of(tmp_path / "x", tmp_path / "x" / "x.tar")
    else:
        np.save(tmp_path / "x" / "x.npy", RANDOM.random((20, 5)))
    said = f"left out, beside the {suffix} files: 000.png, 001.png, 002.png and 17 more"
    assert said in load(tmp_path / "x").notes


def test_labels_of_an_archive_must_be_whole_numbers_of_all_images(tmp_path):
    write_pictures(tmp_path / "pictures", 20)
    tar_of(tmp_path / "pictures", tmp_path / "x.tar", labels=False)
    assert load(tmp_path / "x.tar").train_labels is None
    members = {f"{index}.png": file.read_bytes() for index, file in enumerate((tmp_path / "pictures").iterdir())}
    loaded = load(write_tar(tmp_path / "x.tar", {**members, "3.cls": b"1"}))
    assert loaded.train_labels is None
    assert "labels left out: not every image has a .cls member with a whole number" in loaded.notes


def test_bad_archives_are_named_before_the_run(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", 20)
    path = tar_of(tmp_path / "pictures", tmp_path / "x.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmember("a/005.png")
    head, end = member.offset, member.offset_data
    cases = {
        "truncated": whole[: end + 20],
        "truncated after its last whole member": whole[:head],
        "damaged after its last whole member": whole[: head + 10] + b"?" * 90 + whole[head + 100 :],
        "the file is empty": b"",
        "not a plain tar file": b"PNG not an archive" * 99,
        "a/005.png in": whole[:end] + bytes(member.size) + whole[end + member.size :],
    }
    for expected, content in cases.items():
        path.write_bytes(content)
        error = refused(capsys, tmp_path / "run", "--data", str(path))
        assert expected in error
        assert str(path) in error
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "pictures")
    assert "not a plain tar file" in refused(capsys, tmp_path / "run", "--data", str(path))
    write_tar(path, {"a.txt": b"a"})
    assert "no images in this archive" in refused(capsys, tmp_path / "run", "--data", str(path))


def test_foreign_pictures_are_named_before_the_run(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    write_pictures(tmp_path / "x", 12)
    chosen = ("--data", str(tmp_path / "x"), "--stream")
    for content in (b"", b"not a picture", (tmp_path / "x" / "003.png").read_bytes()[:20]):
        (tmp_path / "x" / "005.png").write_bytes(content)
        assert "005.png is truncated, or not an image" in refused(capsys, tmp_path / "run", *chosen)
    image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "x" / "005.png")
    assert "different depths" in refused(capsys, tmp_path / "run", *chosen)
    image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "x" / "005.png")
    assert "2 different sizes; give --image-size" in refused(capsys, tmp_path / "run", *chosen)
    image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "x" / "005.png")
    loaded = load(tmp_path / "x", stream=True)
    assert (loaded.train.source[5] == 51).all(), "grey among colour is converted"
    assert loaded.shape == (3, 8, 8)


def test_held_out_data_are_bounded_and_moments_sampled(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", values := RANDOM.normal(5, 3, (300, 4)))
    for name, most in {"fastkl.vae.data.stored.HELD": 25, "fastkl.vae.data.scaling.SAMPLED": 150}.items():
        monkeypatch.setattr(name, most)
    loaded = load(tmp_path / "x.npy", stream=True, validation=0.1)
    assert (len(loaded.train), len(loaded.test), len(loaded.validation)) == (216, 25, 24)
    assert "test: 25 of 60 data, at random, which stay in memory" in loaded.notes
    assert "standardised per feature by 150 of the training data" in loaded.values
    sample = values[loaded.train.rows[:150]]
    np.testing.assert_allclose(loaded.scaling.mean, sample.mean(0))
    np.testing.assert_allclose(loaded.scaling.deviation, sample.std(0, ddof=1))
    low, high = loaded.range
    assert (low, high) == (loaded.train[:].min().item(), loaded.train[:].max().item())


def test_the_fingerprint_follows_names_and_a_sample_of_values(tmp_path):
    """A mended file may replace a damaged one, whatever its size; other data are noticed."""
    write_pictures(tmp_path / "x", 96)
    before = load(tmp_path / "x", stream=True)
    assert load(tmp_path / "x", stream=True).fingerprint == before.fingerprint != load(tmp_path / "x").fingerprint
    unread = before.train.rows[1]
    shutil.copy(tmp_path / "x" / "000.png", tmp_path / "x" / f"{unread:03}.png")
    assert load(tmp_path / "x", stream=True).fingerprint == before.fingerprint
    write_pictures(tmp_path / "other", 96, seed=1)
    assert load(tmp_path / "other", stream=True).fingerprint != before.fingerprint
    (tmp_path / "x" / "050.png").rename(tmp_path / "x" / "050b.png")
    assert load(tmp_path / "x", stream=True).fingerprint != before.fingerprint


def test_an_overflow_names_the_row_of_the_file():
    scaling = Scaling("normal", np.zeros(()), np.full((), 1e-30))
    stored = Stored(np.full((9, 2), 1e20), np.array([7, 8]), scaling)
    with pytest.raises(UserError, match="row 8 is too far"):
        stored[1:]
