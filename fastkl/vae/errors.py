"""Errors that the person at the command line can do something about: shown as one line, without a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""


def require(module: str, why: str, extra: str = "train") -> ModuleType:
    """Import an optional dependency; if it is missing, say which command installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.split(".")[0] == "fastkl":
            raise
        raise UserError(f'{why} needs {missing}, which is not installed: pip install "fastkl[{extra}]"') from None
