"""Options of a run in a file: TOML, or the settings.json of an earlier run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastkl.vae.errors import UserError, require
from fastkl.vae.rules import check_names, defaults


def read_config(path: Path) -> dict[str, Any]:
    """The options in a file. Names have underscores or hyphens, and any tables may group them.

        steps = 500
        [prior]
        prior = "gmm"

    Raises:
        UserError: the file cannot be read, or an option is unknown, of a wrong type, or given twice.
    """
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--config {path}: expected a .toml or .json file")
    reader: Any = json
    if path.suffix == ".toml":  # Python reads TOML from version 3.11
        reader = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "--config with a .toml file")
    try:
        held = reader.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--config {path}: not valid {path.suffix[1:].upper()} ({error})".splitlines()[0]) from None
    if not isinstance(held, dict):
        raise UserError(f"--config {path}: expected an object with options by name")
    given: dict[str, Any] = {}
    for name, value in held.items():
        for own, one in value.items() if isinstance(value, dict) else [(name, value)]:
            own = own.replace("-", "_")
            if own in given:
                raise UserError(f"--config {path}: {own} is given twice")
            given[own] = one
    try:
        check_names(given)
    except TypeError as error:
        raise UserError(f"--config {path}: {error}") from None
    return chosen(given) if path.suffix == ".json" else given


def chosen(saved: dict[str, Any]) -> dict[str, Any]:
    """The options of a run's settings that are not the defaults of its data, model, objective and prior."""
    names = ("preset", "data", "objective", "prior", "model")
    kinds = {name: saved[name] for name in names if name in saved}
    usual = defaults(kinds)
    return {name: value for name, value in saved.items() if name in kinds or value != getattr(usual, name)}
