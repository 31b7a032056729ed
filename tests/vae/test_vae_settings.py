"""The command line: a run's settings, and which of them may change when it resumes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

import fastkl
from fastkl.vae import checkpoint, folders, loop
from fastkl.vae.cli import main, parser
from fastkl.vae.errors import TRAIN, UserError, check_installed, not_installed, require
from fastkl.vae.rules import flag, resolve, resume
from fastkl.vae.settings import FOR_DATA, FOR_MODEL, FOR_OBJECTIVE, FOR_PRESET, GROUPS, Settings

from vae_helpers import BARE, SMALL, command, refused, run, train, write_pictures


def test_options_typed_win_over_the_preset_and_that_over_the_data():
    assert resolve({}) == Settings()
    assert resolve({"data": "mnist5k"}).hidden == FOR_DATA["mnist5k"]["hidden"]
    large = resolve({"preset": "large-latent", "batch_size": 2})
    assert (large.model, large.batch_size) == ("conv", 2)
    assert large.latent >= 16
    large = resolve({"preset": "large-latent", "image_size": 256})
    assert large.crop // 2**large.layers >= 64, "the page promises a latent of 16 x 64 x 64"
    assert resolve({"data": "photos", "image_size": 0}).crop == FOR_DATA["photos"]["crop"], "0 keeps their size"
    assert resolve({"data": "photos", "image_size": 100, "crop": 32}).crop == 32
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
    assert "other values than at the start" in refused(
        capsys, tmp_path / "run", "--resume", "--data", str(tmp_path / "x.npy")
    )


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
    first = folders.claim_new(None, "digits")
    assert first.folder.name == "digits"
    for name in ("digits", "digits-2", "digits-10", "digits-gmm"):
        (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name / "checkpoint.pt").touch()
    assert folders.claim_new(None, "digits").folder.name == "digits-11"
    assert folders.claim_old(None, "digits").folder.name == "digits-10"


def test_two_runs_that_start_at_once_have_two_folders(tmp_path, monkeypatch):
    """And neither takes the folder of a run that was killed before its first checkpoint."""
    monkeypatch.chdir(tmp_path)
    claims = [folders.claim_new(None, "digits") for _ in range(3)]
    assert [claim.folder.name for claim in claims] == ["digits", "digits-2", "digits-3"]
    with pytest.raises(UserError, match="another process is training in this folder"):
        folders.claim_new(claims[0].folder, "digits")
    for claim in claims:
        claim.release()
    assert not list((tmp_path / "runs").iterdir()), "folders in which nothing was written are left behind"


def test_a_run_without_a_checkpoint_is_neither_lost_nor_taken(tmp_path, capsys, monkeypatch):
    """A run killed before its first checkpoint restarts with its own settings."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda run, display: False)
        assert train(tmp_path / "run", *BARE, "--beta", "2") == 130
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert "holds a run" in refused(capsys, tmp_path / "run")
    assert train(tmp_path / "run", *BARE, "--resume") == 0
    assert "from the beginning" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run")["settings"]["beta"] == 2
    (tmp_path / "run" / "checkpoint.pt").unlink()
    for spoiled in ("{", "[]", '{"beta": "two"}', '{"flux": 1}'):
        (tmp_path / "run" / "settings.json").write_text(spoiled)
        refused(capsys, tmp_path / "run", "--resume")


def test_resuming_what_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    assert train(tmp_path / "digits", *BARE) == 0
    said = refused(capsys, tmp_path / "digit", "--resume")
    assert "no run in this folder" in said
    assert f"did you mean {tmp_path / 'digits'}?" in said
    assert not (tmp_path / "digit").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume"]) == 2
    assert "no run in runs/digits" in capsys.readouterr().err


def test_making_a_finished_run_longer(tmp_path, capsys):
    assert train(tmp_path / "cosine", *BARE) == 0
    said = refused(capsys, tmp_path / "cosine", "--resume", "--steps", "20")
    assert "--steps 20 differs from the run's 12" in said
    assert "falls to 0 at the planned end" in said
    assert train(tmp_path / "cosine", *BARE, "--resume") == 0
    assert "cannot be made longer" in capsys.readouterr().out
    assert train(tmp_path / "level", *BARE, "--schedule", "constant") == 0
    options = ["train", "--resume", "--out", str(tmp_path / "level"), *BARE]
    assert main([*options, "--steps", "15"]) == 0
    assert checkpoint.load(tmp_path / "level")["step"] == 15
    assert main([*options, "--epochs", "1"]) == 0, "which is more than the steps, and counts in their place"
    assert checkpoint.load(tmp_path / "level")["step"] == 22


@pytest.mark.parametrize("option", ["--data", "--test-data", "--out"])
def test_empty_paths_are_refused(capsys, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL, *BARE, option, ""]) == 2
    assert f"{option} is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_install_command():
    with pytest.raises(UserError, match=r"needs a_package_that_nobody_has, .*: pip install a_package_that_nobody_has$"):
        require("a_package_that_nobody_has.part", "This")
    with pytest.raises(UserError, match=r"pip install nobody_has$"):
        check_installed("nobody_has", "This")
    assert "pip install scikit-learn;" in str(not_installed("sklearn", "This"))
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f"train = {list(TRAIN)}".replace("'", '"') in project


def test_a_model_of_diffusers_without_diffusers_ends_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    said = refused(capsys, tmp_path / "run", "--model", "autoencoder-kl")
    assert said.endswith('--model autoencoder-kl needs "fastkl[diffusers]", which is not installed: '
                         'pip install "fastkl[diffusers]"\n')  # fmt: skip
    assert "--model-config belongs to --model autoencoder-kl; this run has --model mlp" in refused(
        capsys, tmp_path / "run", "--model-config", "act_fn=silu", "layers_per_block=2"
    )


@pytest.mark.parametrize(
    "options", [("--hidden", "1000000000000000"), ("--data", "{pictures}", "--image-size", "100000000")]
)
def test_too_little_memory_ends_in_one_line(tmp_path, capsys, options):
    write_pictures(tmp_path / "pictures", 12)
    chosen = [word.format(pictures=tmp_path / "pictures") for word in options]
    error = refused(capsys, tmp_path / "run", *chosen, *(["--stream"] if "--data" in options else []))
    assert "the memory is too small: a smaller --batch-size, --image-size, --hidden or --latent needs less" in error


def test_the_page_lists_every_option_in_the_group_of_the_help():
    page = (Path(__file__).parents[2] / "docs" / "reference-vae.md").read_text(encoding="utf-8")
    lines = page.partition("## Options")[2].partition("\n## ")[0].splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split("`")[1::2] for line in lines if line[:2] == "| "}
    for title, names in GROUPS.items():
        assert rows[title][: len(names)] == [flag(name) for name in names], title


def test_the_help_has_the_defaults_that_an_objective_or_a_model_sets():
    told = {item.name: item.metadata["by_default"] for item in dataclasses.fields(Settings)}
    for chosen, values in {**FOR_OBJECTIVE, **FOR_MODEL}.items():
        for name, value in values.items():
            if name in ("threads", "layers"):  # the first depends on the data too, the second is the usual default
                continue
            part = next((part for part in told[name].split("; ") if chosen in part.split(": ")[0].split(", ")), "")
            shown = value if isinstance(value, str) else f"{value:g}"
            assert part.endswith(f": {shown}"), (chosen, name, told[name])


def test_help_has_every_option_in_a_group_and_examples(capsys):
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(item.name for item in dataclasses.fields(Settings))
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n{title}:\n" in text for title in (*GROUPS, "examples"))
    assert all(flag(name) in text for name in listed)
    assert "(default: )" not in text
    for line in text[text.index("examples:") :].splitlines():
        if "fastkl train" in line:
            words = line.split("   ")[0].split()[1:]
            parser().parse_args(words)  # ends the test if one is no option
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert f"fastkl {fastkl.__version__}" in capsys.readouterr().out


def test_module_form_and_lazy_import():
    assert run(command("--help")).stdout.startswith("usage: fastkl train")
    assert run([sys.executable, "-m", "fastkl", "train", "--help"]).stdout.startswith("usage: fastkl train")
    check = "import sys, fastkl; print([name for name in sys.modules if name.startswith('fastkl.vae')])"
    assert run([sys.executable, "-c", check]).stdout == "[]\n"
    heavy = "{'matplotlib', 'tensorboard', 'sklearn', 'rich', 'PIL', 'h5py'}"
    check = f"import sys, fastkl.vae.loop, fastkl.vae.cli; print(sorted({heavy} & set(sys.modules)))"
    assert run([sys.executable, "-c", check]).stdout == "[]\n"
