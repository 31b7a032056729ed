"""Rules for the kernels' source: some versions of Triton miscompile or reject code that breaks them."""

import ast
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parent.parent / "kernels").rglob("*.py"))


def device_functions(source: str) -> list[ast.FunctionDef]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)]


def nested(function: ast.FunctionDef) -> list[str]:
    """Entries of nested arguments, such as `strides[0][1]`."""
    arguments = {argument.arg for argument in function.args.args}
    return [
        ast.unparse(node)
        for node in ast.walk(function)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Subscript)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id in arguments
        and not isinstance(node.value.slice, (ast.Tuple, ast.Slice))
    ]


def subnormal(function: ast.FunctionDef) -> list[float]:
    """Constants that are not normal float32 numbers: Triton 3.6 makes them, and whatever they meet, float64."""
    values = [node.value for node in ast.walk(function) if isinstance(node, ast.Constant)]
    return [value for value in values if isinstance(value, float) and 0.0 < abs(value) < 2.0**-126]


def recursive(function: ast.FunctionDef) -> bool:
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return function.name in [call.id for call in calls if isinstance(call, ast.Name)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 250


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_function_of_the_host_has_types(path):
    """mypy reads no function without them."""
    device = {f.name for f in device_functions(path.read_text())}
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.name not in device and f.returns is None] == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_no_function_calls_itself(path):
    """Triton 3.4 looks for what a function calls without end, even if a constant keeps the call from being compiled."""
    assert [f.name for f in device_functions(path.read_text()) if recursive(f)] == []


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_arguments_are_no_nested_tuples(path):
    """Triton 3.5 loses entries of nested tuples that are 1, and so does 3.6 where numbers stand beside tuples."""
    assert {f.name: found for f in device_functions(path.read_text()) if (found := nested(f))} == {}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_constants_are_normal_numbers(path):
    # The least normal float64 stands where the value is known to be one.
    found = {f.name: set(subnormal(f)) - {2.2250738585072014e-308} for f in device_functions(path.read_text())}
    assert {name: values for name, values in found.items() if values} == {}


def test_the_rules_can_be_broken():
    (function,) = device_functions(
        "@triton.jit\ndef f(x, strides):\n    return x[0][:, None] * strides[0][1] + (x, x)[0] + 1.17549435e-38\n"
    )
    assert nested(function) == ["x[0][:, None]", "strides[0][1]"]
    assert subnormal(function) == [1.17549435e-38]
    assert not recursive(function)
    (again,) = device_functions("@triton.jit\ndef f(x):\n    return f(x)\n")
    assert recursive(again)
    assert len([f for path in KERNELS for f in device_functions(path.read_text())]) > 50
