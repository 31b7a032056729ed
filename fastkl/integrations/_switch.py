"""How an integration puts fastkl into another library, and takes it out again."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch.distributions import kl as torch_kl

_LOCK = threading.RLock()
_MISSING = object()


class UnsupportedVersion(RuntimeError):
    """The other library is not what the integration was written for. Nothing has been replaced."""


class Attribute:
    """`owner.name` is `new` while the integration is enabled."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self.owner, self.name, self.new = owner, name, new
        self.old: Any = _MISSING

    def make(self) -> None:
        self.old = vars(self.owner).get(self.name, _MISSING)  # as it lies there: a static method stays one
        setattr(self.owner, self.name, self.new)

    def undo(self) -> None:
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
        self.old = torch_kl._KL_REGISTRY.get(self.classes, _MISSING)
        torch_kl.register_kl(*self.classes)(self.new)

    def undo(self) -> None:
        if torch_kl._KL_REGISTRY.get(self.classes) is not self.new:
            return  # another library has registered its own since
        if self.old is _MISSING:
            del torch_kl._KL_REGISTRY[self.classes]
            torch_kl._KL_MEMOIZE.clear()
        else:
            torch_kl.register_kl(*self.classes)(self.old)


class Switch:
    """An integration: `enable()`, `disable()`, and `with enable():`. Enabled twice, it has to be disabled twice.

    `changes(**options)` imports the library, checks it and returns what is to be replaced. It may raise
    UnsupportedVersion or ImportError: nothing has been replaced then.
    """

    def __init__(self, changes: Callable[..., list[Attribute | Divergence]]) -> None:
        self.changes = changes
        self.made: list[tuple[dict[str, Any], list[Attribute | Divergence]]] = []

    def enable(self, **options: Any) -> Switch:
        with _LOCK:
            known = any(options == earlier for earlier, _ in self.made)
            changes, made = [] if known else self.changes(**options), []
            try:
                for change in changes:
                    change.make()
                    made.append(change)
            except BaseException:
                for change in reversed(made):
                    change.undo()
                raise
            self.made.append((options, made))
        return self

    def disable(self) -> None:
        with _LOCK:
            if not self.made:
                raise RuntimeError("the integration is not enabled")
            for change in reversed(self.made.pop()[1]):
                change.undo()

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.disable()


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
