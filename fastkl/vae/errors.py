"""Errors that the user can correct: the command line prints them as one line, without a traceback."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class UserError(Exception):
    """A problem and its remedy, in one line."""


# pip's names of packages whose module has another name, and every optional package of `fastkl train`.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "diffusers": '"fastkl[diffusers]"'}
TRAIN = ("rich", "tensorboard", "matplotlib", "pillow", "scikit-learn")


def require(module: str, why: str) -> ModuleType:
    """Import an optional dependency; if it is missing, the error names the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        if missing == "fastkl":
            raise
        raise not_installed(missing, why) from None


def check_installed(module: str, why: str) -> None:
    """Raise the error of `require` before the training, without the time of an import."""
    if importlib.util.find_spec(module) is None:
        raise not_installed(module, why)


def check_sides(levels: int, shape: tuple[int, ...]) -> None:
    """Raise an error unless all sides of images [C, H, W] or videos [C, T, H, W] can be halved `levels` times."""
    factor, sides = 2**levels, shape[1:]
    if any(side % factor for side in sides):
        raise UserError(
            f"--layers {levels} needs sides divisible by {factor}, got {' x '.join(map(str, sides))}: choose "
            f"another {'' if len(sides) == 2 else 'number of frames, '}--image-size or --layers"
        )


def not_installed(module: str, why: str) -> UserError:
    """The error of a missing package; `why` is its subject, such as "--prior flow"."""
    package = PACKAGES.get(module, module)
    rest = f"; all optional packages of training: pip install {' '.join(TRAIN)}" if package in TRAIN else ""
    return UserError(f"{why} needs {package}, which is not installed: pip install {package}{rest}")
