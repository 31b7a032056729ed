"""Options in a file, below those of the command line."""

import json

import pytest

from fastkl.vae import checkpoint

from vae_helpers import BARE, assert_same_state, refused, train

TOML = """
hidden = 12
beta = 2  # a whole number is a number
activation-checkpointing = true

[prior]
prior = "gmm"
components = 3
warm_up = 4
"""


def test_options_of_a_file_and_of_the_command_line(tmp_path):
    (tmp_path / "options.toml").write_text(TOML)
    assert train(tmp_path / "run", *BARE, "--config", str(tmp_path / "options.toml"), "--components", "4") == 0
    settings = checkpoint.load(tmp_path / "run")["settings"]
    expected = {
        "hidden": 16,
        "beta": 2,
        "activation_checkpointing": True,
        "prior": "gmm",
        "components": 4,
        "warm_up": 4,
    }
    assert {name: settings[name] for name in expected} == expected  # hidden is 16 on the command line


def test_the_settings_of_a_run_give_the_same_run(tmp_path):
    assert train(tmp_path / "first", *BARE, "--prior", "gmm", "--components", "3", "--warm-up", "4") == 0
    path = tmp_path / "first" / "settings.json"
    assert train(tmp_path / "again", *BARE, "--config", str(path)) == 0
    assert_same_state(tmp_path / "first", tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "stepps = 3", "unknown option 'stepps'; did you mean 'steps'?"),
        ("a.toml", "steps = 3.5", "steps must be of type int, got 3.5"),
        ("a.toml", "compile = 1", "compile must be of type bool, got 1"),
        ("a.toml", 'prior = "normal"', "prior must be one of 'standard'"),
        ("a.toml", "steps = 3\n[training]\nsteps = 4", "steps is given twice"),
        ("a.toml", "steps = ", "not valid TOML"),
        ("a.json", "[1, 2]", "expected an object with options by name"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "steps: 3", "expected a .toml or .json file"),
        ("a.toml", None, "cannot be read (No such file or directory)"),
        ("a.toml", "ema = 1.0", "--ema must be a decay"),
    ],
)
def test_errors_name_the_file_or_the_option(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in refused(capsys, tmp_path / "run", "--config", str(tmp_path / name))


def test_a_settings_file_is_what_a_run_leaves(tmp_path):
    assert train(tmp_path / "run", *BARE) == 0
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert saved == checkpoint.load(tmp_path / "run")["settings"]
