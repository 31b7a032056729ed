"""Patching fastkl into another library, and undoing it."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributions import register_kl

from fastkl.ops import _torch

_LOCK = threading.RLock()
_LAYERS: list[Layer] = []  # of all integrations, in the order in which they were enabled
_MISSING = object()


class UnsupportedVersion(RuntimeError):
    """The integration does not support this version of the other library. Nothing has been replaced."""


class Attribute:
    """`owner.name` is `new` while the integration is enabled."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self.owner, self.name, self.new = owner, name, new
        self.old: Any = _MISSING

    def make(self) -> None:
        self.old = vars(self.owner).get(self.name, _MISSING)  # the raw entry, so that a static method stays one
        setattr(self.owner, self.name, self.new)

    def undo(self) -> None:
        if vars(self.owner).get(self.name) is not self.new:
            return  # somebody else has replaced it in the meantime
        if self.old is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)


class Divergence:
    """`torch.distributions.kl_divergence` of these two classes is `new` while the integration is enabled."""

    def __init__(self, p: type, q: type, new: Callable[..., Any]) -> None:
        self.classes, self.new = (p, q), new
        self.old: Any = _MISSING

    def make(self) -> None:
        self.old = registered_kl(*self.classes, _MISSING)
        register_kl(*self.classes)(self.new)

    def undo(self) -> None:
        if registered_kl(*self.classes, None) is not self.new:
            return  # another library has registered its own in the meantime
        if self.old is _MISSING:
            _torch.forget_kl(self.classes)
        else:
            register_kl(*self.classes)(self.old)


def registered_kl(p: type, q: type, default: Any) -> Any:
    """The function registered by `register_kl(p, q)`."""
    if _torch.kl_registry is None:
        raise UnsupportedVersion("this torch does not say which divergences are registered; nothing was replaced")
    return _torch.kl_registry.get((p, q), default)


class Layer:
    """One `enable()` of a switch, and the context manager that ends it. Several switches may replace the same method:
    each layer wraps the one below."""

    def __init__(self, switch: Switch, options: dict[str, Any]) -> None:
        self.switch, self.options = switch, options
        self.made: list[Attribute | Divergence] = []

    def make(self) -> None:
        known = any(layer.made and layer.switch is self.switch and layer.options == self.options for layer in _LAYERS)
        try:
            for change in () if known else self.switch.changes(**self.options):
                change.make()
                self.made.append(change)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        while self.made:
            self.made.pop().undo()

    def disable(self) -> None:
        """Undo this `enable()`. Those that came later stay, on what lies below them now. If one of them cannot, because
        its library has changed in the meantime, it replaces nothing from here on, and its error is raised at the end.
        """
        with _LOCK, _torch.kl_looked_up():
            if self not in _LAYERS:
                raise RuntimeError("the integration is not enabled")
            later, error = _LAYERS[_LAYERS.index(self) + 1 :], None
            changed = any(layer.made for layer in (self, *later))
            for layer in (*reversed(later), self):
                layer.undo()
                _LAYERS.remove(layer)
            for layer in later:
                try:
                    layer.make()
                except BaseException as failed:
                    error = error or failed
                _LAYERS.append(layer)
            if changed:
                _torch.forget_compiled()
            if error is not None:
                raise error

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.disable()


class Switch:
    """An integration: `enable()`, `disable()`, and `with enable():`. If enabled twice, it must be disabled twice.

    `changes(**options)` imports the library, checks it and returns the replacements. If it raises UnsupportedVersion or
    ImportError, nothing has been replaced.
    """

    def __init__(self, changes: Callable[..., Sequence[Attribute | Divergence]]) -> None:
        self.changes = changes

    def enable(self, **options: Any) -> Layer:
        with _LOCK, _torch.kl_looked_up():
            layer = Layer(self, options)
            layer.make()
            _LAYERS.append(layer)
            if layer.made:
                _torch.forget_compiled()
        return layer

    def disable(self) -> None:
        """Undo the last `enable()`."""
        with _LOCK:
            own = [layer for layer in _LAYERS if layer.switch is self]
            if not own:
                raise RuntimeError("the integration is not enabled")
            own[-1].disable()


def find(module: str, name: str, version: str) -> Any:
    """`name` of a module of the installed library. Raises UnsupportedVersion if this version lacks either."""
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ModuleNotFoundError) as error:
        raise UnsupportedVersion(
            f"{module}.{name} is missing; {version} is not supported, and nothing was replaced"
        ) from error


def check_method(owner: Any, name: str, parameters: tuple[str, ...], version: str) -> None:
    """Raises UnsupportedVersion unless `owner.name` is a function of exactly these parameters."""
    function = getattr(owner, name, None)
    found = tuple(inspect.signature(function).parameters) if callable(function) else None
    if found != parameters:
        has = "is missing" if found is None else f"takes ({', '.join(found)})"
        raise UnsupportedVersion(
            f"{owner.__module__}.{owner.__qualname__}.{name} {has}, fastkl knows it with ({', '.join(parameters)}); "
            f"{version} is not supported, and nothing was replaced"
        )
