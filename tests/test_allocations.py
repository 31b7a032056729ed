"""No allocation depends on a default dtype or device, which a user may set for the rest of a program."""

import ast
from pathlib import Path

import pytest

import fastkl

ROOT = Path(fastkl.__file__).parent
MODULES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
ALLOCATORS = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros", "tril_indices", "triu_indices",
}  # fmt: skip
# Indices are int64 whatever the default, and where a module's parameters are made the defaults are the user's.
WITHOUT_DTYPE = {"arange", "tril_indices", "triu_indices"}
OF_THE_USER = {"Parameter", "register_buffer"}


def loose(source: str) -> list[str]:
    """The calls of torch's allocators that leave a dtype or a device to the defaults."""
    found, excused = [], set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in OF_THE_USER:
            excused |= {id(child) for child in ast.walk(node)}
        of_torch = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "torch"
        given = {keyword.arg for keyword in node.keywords}  # None for **settings, which are looked at by eye
        wanted = {"device"} if name in WITHOUT_DTYPE else {"device", "dtype"}
        if of_torch and name in ALLOCATORS and id(node) not in excused and None not in given and not wanted <= given:
            found.append(f"line {node.lineno}: torch.{name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_allocations_say_their_dtype_and_device(module):
    assert not loose(MODULES[module].read_text(encoding="utf-8"))


def test_a_loose_allocation_is_found():
    assert len(loose("torch.zeros(3)\ntorch.ones((), device=d)\ntorch.arange(3)\nnn.Parameter(torch.zeros(2))")) == 3
    assert not loose("torch.full((), 1.0, dtype=a, device=b)\ntorch.arange(3, device=d)\ntorch.empty(3, **like)")
