"""The compilation of a C source at first use, and a cache of the libraries, as Triton has one of its kernels.

The folder is FASTKL_CACHE, or fastkl under XDG_CACHE_HOME or ~/.cache, private to the user. A library's name is a hash
of everything it was built from, its last bytes are a checksum, and it is renamed into place atomically. So a stale one
is never loaded, a truncated one is rebuilt, and two processes may compile at once. If the folder is unusable, each
process compiles its own library and deletes it.
FASTKL_NATIVE=0 disables native code; CC is the compiler, optionally with arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
BOUNDS = "bounds.c"  # compiled into every library
# No -ffast-math, so that infinities and NaN work. Sums are reordered only by `omp simd`; multiply-adds are fused.
FLAGS = ["-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC", "-w"]
if platform.machine() == "x86_64":
    FLAGS.append("-mprefer-vector-width=512")  # if the CPU has such vectors: loops that compute take 10 to 20 % less
DIGEST = hashlib.sha256().digest_size
SECONDS = 300  # timeout for a compiler that hangs
LEFT_BEHIND = 3600  # seconds; an older build folder was left by a killed process

_lock = threading.Lock()
_log = logging.getLogger("fastkl")
_said: set[str] = set()


def _warn_once(what: str, message: str) -> None:
    if what not in _said:
        _said.add(what)
        warnings.warn(message, stacklevel=2)


@functools.cache
def _compiler() -> tuple[str, ...] | None:
    """The compiler command: a program and its first arguments."""
    named = os.environ.get("CC", "").strip()
    if not named:
        return next(((path,) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    try:
        choices = [[named], shlex.split(named)]  # a path that may contain spaces, or a command with arguments
    except ValueError:
        choices = [[named]]
    for program, *options in choices:
        if path := shutil.which(program):
            return os.path.abspath(path), *options
    _warn_once("CC", f"CC={named!r} names no program: fastkl's CPU tensors go through torch's operations")
    return None


def _run(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command and capture its output as text; undecodable bytes are replaced."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=SECONDS,
        env=env,
    )  # fmt: skip


@functools.cache
def _machine() -> str:
    """The CPU features that -march=native depends on, and the compiler's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    return f"{platform.machine()}\n{processor}\n{_run([*(_compiler() or ()), '--version']).stdout}"


def folder() -> Path:
    """The cache folder, created if missing, private to the user. Raises OSError with the reason if unusable."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if given := os.environ.get("FASTKL_CACHE"):
            path = Path(given).expanduser().absolute()
        else:  # XDG forbids relative paths, and without a home directory "~" stays relative
            path = Path(base if os.path.isabs(base) else Path.home() / ".cache", "fastkl")
    except RuntimeError as error:
        raise OSError(str(error)) from None
    if not path.is_absolute():
        raise OSError(f"{path} is not an absolute path")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not mine or stat.S_IMODE(found.st_mode) & 0o022:
        raise OSError(f"{path} is not private to this user")
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file ends in the checksum of the rest."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return len(content) > DIGEST and hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _scratch(**place) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True, **place)


def _sweep(cache: Path) -> None:
    """Delete build folders that killed processes left."""
    for left in cache.glob(".build-*"):
        with contextlib.suppress(OSError):  # another process may be deleting it
            if time.time() - left.stat().st_mtime > LEFT_BEHIND:
                shutil.rmtree(left)


def _compile(source: Path, options: tuple[str, ...], path: Path) -> None:
    """Write the library of a source to `path`, with its checksum. Raises OSError with the compiler's message."""
    with _scratch(dir=path.parent, prefix=".build-") as scratch:
        made = Path(scratch) / "library.so"
        sources = [str(source), str(SOURCES / BOUNDS)]
        command = [*(_compiler() or ()), *FLAGS, *options, "-shared", *sources, "-o", str(made), "-lm"]
        done = _run(command, env={**os.environ, "TMPDIR": scratch})  # so that its temporary files are deleted too
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.chmod(0o700)
        os.replace(made, path)


def _kept(source: Path, options: tuple[str, ...], name: str) -> ctypes.CDLL:
    """Load a library from the cache, and build it first if it is missing or damaged."""
    path = folder() / name
    if not _is_whole(path):
        _sweep(path.parent)
        _compile(source, options, path)
    return ctypes.CDLL(str(path))


def _passing(source: Path, options: tuple[str, ...], name: str) -> ctypes.CDLL:
    """Build a library without the cache, and delete it once it is loaded."""
    with _scratch(prefix="fastkl-") as own:
        path = Path(own) / name
        _compile(source, options, path)
        return ctypes.CDLL(str(path))


def build(family: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library of a source for float32 or float64, compiled if not cached; None if that is impossible."""
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
        name = f"{family}-{name}.so"
        try:
            return _kept(source, options, name)
        except OSError as error:
            reason = error
        library = _passing(source, options, name)  # the disk is full, read-only or noexec
    except (OSError, subprocess.SubprocessError) as error:
        _warn_once(
            "compiler", f"fastkl could not compile its native CPU code and uses torch's operations instead: {error}"
        )
        return None
    remedy = "set FASTKL_CACHE to a folder in which it can be kept"
    _warn_once("cache", f"fastkl compiles its native CPU code again in each process ({reason}): {remedy}")
    return library


_libraries: dict[tuple[str, torch.dtype], ctypes.CDLL | None] = {}


def library(family: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """`build`, cached per process."""
    key = (family, dtype)
    if key not in _libraries:
        with _lock:
            if key not in _libraries:
                _libraries[key] = build(family, dtype)
    return _libraries[key]
