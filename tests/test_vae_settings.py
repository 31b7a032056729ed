"""The command line: what a run is made of, and what may change when it goes on."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from fastkl.vae.cli import choose_folder, parser
from fastkl.vae.errors import UserError, require
from fastkl.vae.rules import resolve, resume
from fastkl.vae.settings import FOR_DATA, FOR_PRESET, Settings

from vae_helpers import BARE, command, refused, run, train


def test_options_typed_win_over_the_preset_and_that_over_the_data():
    assert resolve({}) == Settings()
    assert resolve({"data": "mnist5k"}).hidden == FOR_DATA["mnist5k"]["hidden"]
    large = resolve({"preset": "large-latent", "batch_size": 2})
    assert (large.model, large.batch_size) == ("conv", 2)
    assert large.latent >= 16
    assert large.image_size // 2**large.layers >= 64, "the preset promises a latent of at least 64 x 64 x 16"
    assert resolve({"data": "mnist5k", "preset": "large-latent"}).hidden == FOR_PRESET["large-latent"]["hidden"]


def test_every_setting_is_an_option():
    options = parser().parse_args(["train", "--hidden", "8", "--learning-rate", "0.5"])
    assert (options.hidden, options.learning_rate) == (8, 0.5)
    assert not hasattr(options, "latent"), "an option that was not typed must not override a preset"


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(Settings) if item.metadata["maths"]])
def test_resuming_with_other_maths_is_refused_by_name(name):
    saved = dataclasses.asdict(Settings())
    value = saved[name]
    other = f"not {value}" if isinstance(value, str) else value + 1
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
        resume(saved, {name: other})
    assert resume(saved, {name: value}) == Settings()


def test_resuming_may_change_what_leaves_the_numbers_alone():
    saved = dataclasses.asdict(Settings(schedule="constant"))
    assert resume(saved, {"log_every": 7, "steps": 9, "checkpoint_every": 3}).steps == 9
    with pytest.raises(UserError, match="another version"):
        resume({**saved, "flux": 1}, {})


def test_resume_with_other_settings_or_data_ends_in_one_line(tmp_path, capsys):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((100, 8)))
    assert train(tmp_path / "run", *BARE) == 0
    assert "--beta" in refused(capsys, tmp_path / "run", "--resume", "--beta", "2")
    assert "not the data" in refused(capsys, tmp_path / "run", "--resume", "--data", str(tmp_path / "x.npy"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--batch-size", "100000"), "more than the 1438 training data"),
        (("--learning-rate", "nan"), "--learning-rate must be a finite"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--model", "conv", "--layers", "5"), "--image-size"),
        (("--data", "nowhere"), "no such file"),
    ],
)
def test_bad_options_end_in_one_line(tmp_path, capsys, options, expected):
    assert expected in refused(capsys, tmp_path / "run", *options)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_folders_are_numbered_and_the_latest_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_folder(None, False, "digits").name == "digits"
    for name in ("digits", "digits-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").touch()
    assert choose_folder(None, False, "digits").name == "digits-3"
    assert choose_folder(None, True, "digits").name == "digits-2"


def test_missing_package_names_the_command_that_installs_it():
    with pytest.raises(UserError, match=r'pip install "fastkl\[train\]"'):
        require("a_package_that_nobody_has.part", "This")


def test_module_form_and_lazy_import():
    assert run(command("--help")).stdout.startswith("usage: fastkl train")
    check = "import sys, fastkl; print([name for name in sys.modules if name.startswith('fastkl.vae')])"
    assert run([sys.executable, "-c", check]).stdout == "[]\n"
    heavy = "{'matplotlib', 'tensorboard', 'sklearn', 'rich', 'PIL', 'h5py'}"
    check = f"import sys, fastkl.vae.train, fastkl.vae.cli; print(sorted({heavy} & set(sys.modules)))"
    assert run([sys.executable, "-c", check]).stdout == "[]\n"
