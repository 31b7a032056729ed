"""Errors that the person at the command line can do something about: shown as one line, without a traceback."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class UserError(Exception):
    """What is wrong and what to do about it, in one line."""


# What pip calls the packages that Python imports by another name, and all that `fastkl train` may come to need.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
TRAIN = ("rich", "tensorboard", "matplotlib", "pillow", "scikit-learn")


def require(module: str, why: str) -> ModuleType:
    """Import an optional dependency; if it is missing, say which command installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if missing == "fastkl":
            raise
        raise lacking(missing, why) from None


def foresee(module: str, why: str) -> None:
    """Say so now, without the time that an import takes, if `require` will fail after the training."""
    if importlib.util.find_spec(module) is None:
        raise lacking(module, why)


def lacking(module: str, why: str) -> UserError:
    package = PACKAGES.get(module, module)
    rest = f"; all that training can need: pip install {' '.join(TRAIN)}" if package in TRAIN else ""
    return UserError(f"{why} needs {package}, which is not installed: pip install {package}{rest}")
