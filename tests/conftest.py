"""Runs before anything imports Triton: without a GPU the kernels run in Triton's interpreter, on CPU tensors."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(min(2, torch.get_num_threads()))


def patch_once_a_launch() -> None:
    """The interpreter patches triton.language at every call of a device function, as if it were a launch of its own:
    up to half of all the time. Once for each module of functions that a launch calls is enough."""
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return  # another Triton, which may be slower
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        if language.core.is_builtin(language.load):  # nothing is patched: a launch begins
            patched.clear()
        if function.__module__ in patched:
            return interpreter._LangPatchScope()  # nothing to restore
        patched.add(function.__module__)
        return patch(function)

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_once_a_launch()
