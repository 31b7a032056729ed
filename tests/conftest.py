"""Runs before anything imports Triton: without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import atexit
import gc
import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()))
# torch.compile creates so many objects that garbage collection takes a sixth of its time.
gc.set_threshold(200_000, 20, 100)
atexit.register(gc.unfreeze)  # libraries complain at the end about what is never freed
# Inductor would test the compiler for each kind of vector code, and start processes: longer work than what it compiles.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def patch_once_a_launch() -> None:
    """Let the interpreter patch triton.language once per module and launch. It does so at every call of a device
    function, which takes up to half of the time."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return  # another Triton: just slower
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if language.core.is_builtin(language.load):  # nothing is patched: a launch begins
            patched.clear()
        if function.__module__ in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.add(function.__module__)
        return patch(function)

    interpreter._patch_lang = patch_once


def share_types() -> None:
    """Let equal blocks share their immutable type and shape objects. The interpreter creates them at every operation,
    and compares them entry by entry, which takes half of its time."""
    from triton import language
    from triton.runtime import interpreter

    unwrapped, semantic = language.core._unwrap_if_constexpr, language.semantic.TritonSemantic
    new_type, new_tensor, new_dtype = language.block_type.__init__, language.tensor.__init__, interpreter._get_np_dtype
    new_pair = semantic.broadcast_impl_value
    types, shapes, dtypes = {}, {}, {}

    def block_type(self, element_ty, shape):
        sizes = tuple([size if type(size) is int else unwrapped(size) for size in shape])
        like = types.get((element_ty.name, sizes))
        if like is None:
            new_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            types[element_ty.name, sizes] = self.__dict__
        else:
            self.__dict__.update(like)

    def broadcast(self, lhs, rhs):
        shape = getattr(lhs.type, "shape", None)
        if shape is not None and shape is getattr(rhs.type, "shape", None):
            return lhs, rhs
        return new_pair(self, lhs, rhs)

    def tensor(self, handle, type):
        like = type.__dict__.get("a_tensor")
        if like is None:
            new_tensor(self, handle, type)
            type.a_tensor = {name: value for name, value in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(like, handle=handle)

    language.block_type.__init__, language.tensor.__init__ = block_type, tensor
    semantic.broadcast_impl_value = broadcast
    interpreter._get_np_dtype = lambda type: dtypes.get(type.name) or dtypes.setdefault(type.name, new_dtype(type))


def omit_unused_checks() -> None:
    """Look for overflows only in debug mode: the interpreter always does, a fifth of its time, and drops the result."""
    from triton import language

    semantic = language.semantic.TritonSemantic
    check = semantic.binary_op_sanitize_overflow_impl

    def check_in_debug_mode(self, *operands):
        if self.builder.options.debug:
            check(self, *operands)

    semantic.binary_op_sanitize_overflow_impl = check_in_debug_mode


def mend_older_interpreters() -> None:
    """Backport from the interpreter of Triton 3.9: a fused multiply-add rounds once, as on every GPU (before 3.9
    twice), and an array of one element is an index (before 3.7 not with NumPy 2.4)."""
    import numpy as np
    import triton
    from triton.runtime import interpreter

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 9):

        def create_fma(self, x, y, z):
            wide = np.longdouble if z.data.dtype == np.float64 else np.float64
            return interpreter.TensorHandle(
                (x.data.astype(wide) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar
            )

        interpreter.InterpreterBuilder.create_fma = create_fma
    if version < (3, 7):
        patch = interpreter._patch_lang_tensor

        def patch_with_index(tensor, *scope):
            patch(tensor, *scope)
            tensor.__index__ = lambda self: int(self.handle.data.squeeze())

        interpreter._patch_lang_tensor = patch_with_index


def cast_float64_to_bfloat16() -> None:
    """Fix this cast: the interpreter treats bfloat16 as an integer and stores 0. Compiled code is correct."""
    from triton import language
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == language.float64 and dst_type.scalar == language.bfloat16:
            src = cast(self, src, language.float32)
        return cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_once_a_launch()
    share_types()
    omit_unused_checks()
    cast_float64_to_bfloat16()
    mend_older_interpreters()


# fmt: off
# The slowest files run first, so that no process works on one of them when the others have finished.
LONG = ("test_gpu_script.py", "test_contract.py", "test_vae_parallel.py", "test_vae_resume.py", "test_compiled.py",
        "test_bench.py", "test_vae_objectives.py", "test_vae_priors.py", "test_group.py", "test_host_path.py",
        "test_fuzz.py")
# fmt: on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort slow files first, and skip the flow's doctest without zuko."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if importlib.util.find_spec("zuko") is None:
        for item in items:
            examples = getattr(getattr(item, "dtest", None), "examples", ())
            if any("zuko" in example.source for example in examples):
                item.add_marker(pytest.mark.skip(reason="needs zuko"))


@pytest.fixture(autouse=True, scope="module")
def _collect_own_garbage() -> None:
    """gc.collect() does not search what was there before a file's tests: after many compilations that takes seconds."""
    gc.freeze()
