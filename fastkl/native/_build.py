"""Compiles a source when it is first needed and keeps the library, as Triton keeps its kernels.

The folder is FASTKL_CACHE, or fastkl under XDG_CACHE_HOME or ~/.cache, and is the user's alone. A library's name says
everything it was made from, its last bytes are the checksum of the others, and it appears under its name in one step:
a stale one is never found, a truncated one is made again, and two processes that compile at once do not meet.
FASTKL_NATIVE=0 turns all of this off; CC names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
BOUNDS = "bounds.c"  # goes into every library
# Infinities and NaN are kept: no -ffast-math. Sums are reordered where `omp simd` says so, products and sums fused.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC", "-w")
DIGEST = hashlib.sha256().digest_size
SECONDS = 300  # for a compiler that hangs

_lock = threading.Lock()
_log = logging.getLogger("fastkl")


@functools.cache
def _compiler() -> str | None:
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def _machine() -> str:
    """What -march=native depends on, and the compiler's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    version = subprocess.run([_compiler(), "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    return f"{platform.machine()}\n{processor}\n{version}"


def folder() -> Path:
    """The cache, made private to the user; another private folder, of this process alone, where that cannot be."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(os.environ.get("FASTKL_CACHE") or os.path.join(base, "fastkl"))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
        if mine and not stat.S_IMODE(found.st_mode) & 0o022 and os.access(path, os.W_OK | os.X_OK):
            return path
        _log.info("%s is not private to this user: native code is not kept there", path)
    except OSError as error:
        _log.info("%s: native code is not kept", error)
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fastkl-"))


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(source: Path, options: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        made = Path(scratch) / "library.so"
        command = [_compiler(), *FLAGS, *options, "-shared", str(source), str(SOURCES / BOUNDS), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.chmod(0o700)
        os.replace(made, path)


def build(family: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library of a source for float32 or float64, compiled where it is not there; None where that cannot be."""
    if os.environ.get("FASTKL_NATIVE") == "0":
        return None
    if _compiler() is None:
        _log.info("no C compiler (cc, gcc, clang; CC): CPU tensors go through torch's own operations, which is slower")
        return None
    source = SOURCES / f"{family}.c"
    options = ("-DFLOAT64",) if dtype == torch.float64 else ()
    try:
        texts = [path.read_bytes() for path in (source, SOURCES / BOUNDS, *sorted(SOURCES.glob("*.h")))]
        made_from = [*texts, repr((FLAGS, options, _compiler(), _machine())).encode()]
        name = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in made_from)).hexdigest()[:32]
        path = folder() / f"{family}-{name}.so"
        if not _is_whole(path):
            _compile(source, options, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"fastkl could not compile its native CPU code and goes on with torch's operations: {error}", stacklevel=2
        )
        return None


_libraries: dict[tuple[str, torch.dtype], ctypes.CDLL | None] = {}


def library(family: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """`build`, once for each process."""
    key = (family, dtype)
    if key not in _libraries:
        with _lock:
            if key not in _libraries:
                _libraries[key] = build(family, dtype)
    return _libraries[key]
